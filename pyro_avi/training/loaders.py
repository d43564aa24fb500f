"""Batches as arguments of steps, epoch after epoch of a loader or of any other collection; and checks of a loader's rows."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from pyro_avi.optimization.step import HasRowTables
from pyro_avi.rows.subsample import Subsample
from pyro_avi.seeds import Stream, seeded

__all__ = ["HasRows", "LoaderRowCheck", "arguments_from_batches", "check_not_shared"]


@runtime_checkable
class HasRows(Protocol):
    """A guide that knows which rows of its model a call is about."""

    @property
    def global_latents(self) -> tuple[str, ...]:
        """The names of the latents that all rows share."""
        ...

    def rows_of(self, *args, **kwargs) -> dict[str, Subsample]:
        """By plate the rows of a call, without ``index`` where it gives no positions."""
        ...


def arguments_from_batches(batches: Iterable, model: Callable, seed: int | None) -> Iterator[tuple]:
    """The positional arguments of every step.

    Args:
        batches: an iterator, which is used until it ends; or a collection, which is iterated over again and again.
        model: the model, whose signature orders the fields of batches that are dictionaries.
        seed: the seed of a loader's draws; with ``None`` it draws from the program's state and its own generators.

    Raises:
        ValueError: if there is no batch.
        TypeError: if a data set is given in the place of a loader, or a loader's batch does not fit the model's arguments.
    """
    if isinstance(batches, DataLoader):
        return _arguments_from_loader(batches, model, seed)
    if isinstance(batches, Dataset):
        raise TypeError(
            f"Expected batches of rows, got the data set {type(batches).__name__}.\n"
            "Pass batches=torch.utils.data.DataLoader(dataset, batch_size=..., shuffle=True)."
        )
    source = iter(batches)
    return source if source is batches else _cycled(batches)


def _cycled(batches: Iterable[tuple]) -> Iterator[tuple]:
    for epoch in itertools.count():
        call = None
        for call in batches:
            yield call
        if call is None:
            raise ValueError(
                f"Expected batches for every step, got none in epoch {epoch} of a {type(batches).__name__}."
            )


def _arguments_from_loader(loader: DataLoader, model: Callable, seed: int | None) -> Iterator[tuple]:
    draws = nullcontext if seed is None else _LoaderRandomState(loader, seed).active
    for epoch in itertools.count():
        if isinstance(loader.sampler, DistributedSampler):
            # It would give every epoch the same order.
            loader.sampler.set_epoch(epoch)
        with draws():
            batches = iter(loader)
        count = 0
        while True:
            with draws():
                # Here a sampler draws, and a data set that adds noise.
                batch = next(batches, None)
            if batch is None:
                break
            count += 1
            yield _arguments(batch, model)
        if count == 0:
            raise ValueError(
                f"Expected batches for every step, got none in epoch {epoch} of the loader.\n"
                "With drop_last=True a data set of fewer rows than batch_size has no batch."
            )


class _LoaderRandomState:
    """A random state for a loader. Those of the program and of the loader's own generators are left as they were.

    Args:
        loader: the loader, whose sampler and data set draw.
        seed: the seed of the state.
    """

    def __init__(self, loader: DataLoader, seed: int):
        with seeded(seed):
            # Another seed than the guide's: noise that a data set adds must be independent of what the guide draws.
            own = int(torch.randint(2**31, ()))
        self._stream = Stream(own)
        samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
        found = [getattr(each, "generator", None) for each in (loader, *samplers)]
        generators = {id(each): each for each in found if isinstance(each, torch.Generator)}
        self._generators = list(generators.values())
        self._states = [torch.Generator().manual_seed(own).get_state() for _ in self._generators]

    @contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the loader draws from the state, on from where the last context ended."""
        outer = [each.get_state() for each in self._generators]
        _set(self._generators, self._states)
        try:
            with self._stream:
                yield
        finally:
            self._states = [each.get_state() for each in self._generators]
            _set(self._generators, outer)


def _set(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _arguments(batch: Any, model: Callable) -> tuple:
    """A batch of a loader as positional arguments."""
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, Mapping):
        return _by_name(batch, model)
    if isinstance(batch, tuple | list):
        return tuple(batch)
    raise TypeError(
        f"Expected batches of the loader to be a tensor, a tuple, a list or a dictionary of the model's arguments, got a "
        f"{type(batch).__name__}.\nPass DataLoader(..., collate_fn=...) a function that returns such a tuple."
    )


def _by_name(batch: Mapping[str, Any], model: Callable) -> tuple:
    """The fields of a batch in the order of the model's arguments, with defaults for arguments between them."""
    taken = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()
    known = {each.name: each for each in taken if each.kind is each.POSITIONAL_OR_KEYWORD}
    names = list(known)
    unknown = [name for name in batch if name not in known]
    asked = names[: 1 + max((names.index(name) for name in batch if name in known), default=-1)]
    missing = [name for name in asked if name not in batch and known[name].default is inspect.Parameter.empty]
    if unknown or missing:
        raise TypeError(
            f"Expected the fields of the loader's batches to be arguments of the model, {names}, got {list(batch)}.\n"
            "Try one of the following fixes:\n"
            "- DataLoader(..., collate_fn=...) with a function that returns the tuple of the model's arguments\n"
            "- or ({...},), where one argument of the model is the whole dictionary"
        )
    return tuple(batch[name] if name in batch else known[name].default for name in asked)


def check_not_shared(batches: Sequence[Any]) -> None:
    """Refuse batches that several trainings would take from each other.

    Args:
        batches: those of each training.

    Raises:
        ValueError: if two have the same iterator, or the same loader with persistent workers.
    """
    for one, other in itertools.combinations(batches, 2):
        stays = isinstance(one, DataLoader) and one.persistent_workers
        if one is other and one is not None and (stays or isinstance(one, Iterator)):
            what = "a loader with persistent_workers" if stays else "an iterator"
            raise ValueError(
                f"Expected batches that trainings do not take from each other, got {what} for several.\n"
                "Pass a list with one for each: batches=[avi.minibatches(..., seed=seed) for seed in seeds]."
            )


class LoaderRowCheck:
    """Checks the rows of a loader's batches during the first epoch.

    Args:
        batches: the batches of a training; they are checked if they come from a loader.
        guide: any guide.
        kwargs: the keyword arguments of every call.
        start: the number of batches used before a training was resumed.
    """

    def __init__(self, batches: Any, guide: Callable, kwargs: Mapping[str, Any], *, start: int = 0):
        self._guide, self._kwargs, self._left = guide, kwargs, 0
        self._seen: dict[str, Tensor] = {}
        self._repeated: set[str] = set()
        if isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset):
            self._left = len(batches) - start % max(1, len(batches))
            self._size, self._in_order = len(cast(Sized, batches.dataset)), len(batches) == 1 and _is_in_order(batches)
            self._once = _takes_rows_once(batches)

    def check(self, call: tuple) -> tuple:
        """Check the positional arguments of a step, and return them; the guide must have been set up.

        Raises:
            ValueError: if rows have parameters of their own and the call does not say which rows it is about, or if a batch
                would count as the whole data set.
        """
        if self._left and isinstance(self._guide, HasRows):
            self._left -= 1
            rows = self._guide.rows_of(*call, **self._kwargs)
            if isinstance(self._guide, HasRowTables):
                self._check_positions(rows)
            elif rows:
                # One batch is enough: the size of the plate is the same in all.
                self._left = 0
                self._check_size(rows, self._guide.global_latents)
        return call

    def _check_positions(self, rows: Mapping[str, Subsample]) -> None:
        given = {plate: own.index.cpu() for plate, own in rows.items() if own.index is not None}
        for plate, index in given.items():
            seen = self._seen.setdefault(plate, torch.zeros(rows[plate].size, dtype=torch.bool))
            if seen[index].any() or len(index.unique()) < len(index):
                self._repeated.add(plate)
            seen[index] = True
        if given and not (self._once and self._repeated == set(given)):
            return
        if not given and self._in_order:
            return
        found = f"the same positions twice in an epoch of plate {sorted(given)[0]!r}" if given else "none"
        raise ValueError(
            f"Expected the loader's batches to hold the positions of their rows among the {self._size} of its data set, got "
            f"{found}.\nA FactorizedGuide has parameters for each row, and trains others where it is not told which rows are "
            "in a batch.\nTry one of the following fixes:\n"
            "- a data set that returns (x, index), and a model with pyro.plate(name, size, subsample=index)\n"
            "- tensors in memory: batches=avi.minibatches(x, batch_size=...), which gives (x[index], index)\n"
            "- a collate_fn that leaves out labels, where these are taken for positions"
        )

    def _check_size(self, rows: Mapping[str, Subsample], global_latents: Sequence[str]) -> None:
        if not all(own.index is None and own.size < self._size for own in rows.values()):
            return
        plate, own = next(iter(rows.items()))
        found = f"plate {plate!r} to have the {self._size} rows of the loader's data set, got {own.size}"
        shared, often = list(global_latents), f"{self._size / own.size:.3g} times"
        fixes = (
            "Try one of the following fixes:\n"
            f"- a data set that returns (x, index), and a model with pyro.plate({plate!r}, {self._size}, subsample=index)\n"
            f"- without positions: pyro.plate({plate!r}, {self._size}, subsample_size=len(x))"
        )
        if shared:
            raise ValueError(
                f"Expected {found}: a batch that is taken for all the data counts the global latents {shared} {often} too "
                f"often.\n{fixes}"
            )
        warnings.warn(
            f"Expected {found}: losses are those of a batch and not of the data, {often} smaller, and less for a last batch "
            f"of fewer rows.\n{fixes}",
            stacklevel=4,
        )


def _is_in_order(loader: DataLoader) -> bool:
    return type(loader.sampler) is SequentialSampler


def _takes_rows_once(loader: DataLoader) -> bool:
    """Whether an epoch is known to have no row twice."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples <= len(sampler.data_source)
    return type(sampler) is SequentialSampler
