"""Where a model's rows and observed values come from: recorded once, sliced, replayed at every later call.

Looking for the model's data among its arguments by identity fails as soon as the model writes ``x.float()``, ``x / 255``
or ``x[index]``. So the first call of a signature runs the model once under a recorder of tensor operations, walks back
from the rows and observed values to the arguments, and keeps those operations alone: nothing for ``obs=x``, one division
for ``obs=x / 255``. The likelihood is never run again.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pyro_avi.masks import Mask, site_mask
from pyro_avi.replay import CannotReplayError, Recorder, Replay, follow
from pyro_avi.structure import equal, is_latent, is_scaled, plate_scale, quiet, untraced

__all__ = ["Found", "Rows", "Sources"]


@dataclass(frozen=True)
class Rows:
    """The rows of one plate in one call of the model.

    Attributes:
        size: the number ``N`` of rows of the plate.
        index: ``[B]`` the rows of this call, ``None`` for all of them in order.
    """

    size: int
    index: Tensor | None

    def __len__(self) -> int:
        return self.size if self.index is None else len(self.index)


@dataclass(frozen=True)
class Found:
    """What one call of the model works on.

    Attributes:
        rows: the rows of the call, by plate.
        values: the observed values, by site.
        masks: what masks a site, by site; only sites that are masked.
        scales: the factor by which a site's log density counts beyond its plates' ``N / B``, by site; only those scaled.
    """

    rows: dict[str, Rows]
    values: dict[str, Tensor]
    masks: dict[str, Mask]
    scales: dict[str, Tensor | float]


class Sources:
    """Finds the rows of plates and what a model observes, masks and scales in them, for any call of it.

    Python numbers that the model takes from elsewhere than its arguments count as fixed.

    Args:
        model: any Pyro callable.
        plates: the names of the plates.
        sites: the observed sites to read.
        latents: the latent sites whose masks and scales are to be known.
        optional: whether the observed sites are only to recognize a call by: they are left out where it lacks them, hides
            where they come from, or draws its rows.
    """

    # More signatures than that come from a Python number that changes every step.
    max_signatures = 64

    def __init__(
        self,
        model: Callable,
        plates: Sequence[str],
        sites: Sequence[str] = (),
        latents: Sequence[str] = (),
        *,
        optional: bool = False,
    ):
        self._model, self._wanted = model, _Wanted(tuple(plates), tuple(sites), tuple(latents), optional)
        self._slices: dict[tuple, _Slice | _Rerun] = {}
        self._warned: set[str] = set()

    def __getstate__(self):
        # A slice knows its tensors by identity, which a copy has not.
        return {**self.__dict__, "_slices": {}}

    def draws_rows(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """``(N, B)`` of each plate of which the model draws ``B`` of ``N`` rows itself (``subsample_size=``)."""
        return self.call(args, kwargs).drawn

    def read(self, args: tuple, kwargs: Mapping[str, Any], rows: Mapping[str, Tensor] | None = None) -> Found:
        """What a call with these arguments works on.

        Args:
            args, kwargs: the arguments of the model.
            rows: by plate the rows ``[B]`` drawn in the model's stead, where it draws its rows itself.

        Raises:
            ValueError: if the model gives other rows or values when it is run again, or lacks an observation.
        """
        return self.call(args, kwargs).read(rows or {})

    def call(self, args: tuple, kwargs: Mapping[str, Any]) -> "Call":
        """One call of the model, whose rows can be looked at before it is read."""
        leaves, structure = _flatten(args, kwargs)
        with untraced() if torch.jit.is_tracing() else nullcontext():
            slice_ = self._slice((structure, *map(_describe, leaves)), args, kwargs)
        return Call(slice_, args, kwargs, leaves)

    def _slice(self, signature, args, kwargs):
        """How calls of this signature are read: everything about the arguments but the content of tensors."""
        if signature not in self._slices:
            if len(self._slices) == self.max_signatures:
                self._warn_once(
                    f"The model was called with more than {self.max_signatures} kinds of arguments, and each is analysed "
                    "anew. Pass a number that changes from step to step as a 0-dimensional tensor."
                )
                self._slices.clear()
            self._slices[signature] = _trace_back(self._model, self._wanted, args, kwargs, self._warn_once)
        return self._slices[signature]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@dataclass(frozen=True)
class _Wanted:
    plates: tuple[str, ...]
    sites: tuple[str, ...]
    latents: tuple[str, ...]
    optional: bool

    def __str__(self) -> str:
        return f"plate {', '.join(map(repr, self.plates))}"


@dataclass(frozen=True)
class Call:
    """A call of the model with its arguments."""

    _slice: "_Slice | _Rerun"
    _args: tuple
    _kwargs: Mapping[str, Any]
    _leaves: Sequence[Any]

    @property
    def drawn(self) -> dict[str, tuple[int, int]]:
        """As :meth:`Sources.draws_rows`."""
        return self._slice.drawn

    def read(self, rows: Mapping[str, Tensor]) -> Found:
        """As :meth:`Sources.read`."""
        return self._slice.read(self._args, self._kwargs, rows, self._leaves)


_PLAIN = (Tensor, bool, int, float, str, type(None))


def _flatten(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments, and a key of how they are nested."""
    # torch's walk through nests takes longer than all else that a guide has to find out about a call.
    if all(isinstance(x, _PLAIN) for x in args) and all(isinstance(x, _PLAIN) for x in kwargs.values()):
        return [*args, *kwargs.values()], (len(args), *kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    return leaves, repr(structure)


def _describe(leaf) -> tuple:
    if isinstance(leaf, Tensor):
        # Strides of 0 tell that a mask is the same for all elements of an event.
        return leaf.shape, leaf.dtype, leaf.device, leaf.is_contiguous() or leaf.stride()
    # Other objects are told apart by identity; the slice that belongs to them keeps them alive.
    return type(leaf), leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)


class _GiveRows(Messenger):
    """Provide the rows that plates would otherwise draw, and note how they got their rows."""

    def __init__(self, plates: Sequence[str], rows: Mapping[str, Tensor]):
        super().__init__()
        self.plates, self.rows = plates, dict(rows)
        self.found: dict[str, Rows] = {}
        self.drawn: dict[str, tuple[int, int]] = {}

    def _pyro_sample(self, msg):
        name = msg["name"]
        if name not in self.plates or not site_is_subsample(msg):
            return
        size, count, index = msg["fn"].size, msg["fn"].subsample_size, None
        if msg["value"] is not None:
            index = torch.as_tensor(msg["value"])
        elif count is not None and count < size:
            self.drawn[name] = (size, count)
            if name not in self.rows:
                self.rows[name] = msg["fn"].sample()
            index = msg["value"] = self.rows[name]
        self.found[name] = Rows(size, index)


def _run(model, wanted: _Wanted, args, kwargs, *, rows: Mapping[str, Tensor], seed: int, recorder=None):
    """Run the model beside the program; return what it worked on and how its rows came about."""
    given = _GiveRows(wanted.plates, rows)
    # Validation would read data (`valid.all()`), which is no part of the model.
    with quiet(seed), pyro.validation_enabled(False), given, recorder or nullcontext():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        values, masks, scales = {}, {}, {}
        for name in wanted.sites:
            site = trace.nodes.get(name)
            if site is not None and site["is_observed"]:
                values[name] = site["value"]
            elif not wanted.optional:
                raise ValueError(
                    f"Expected an observed value at site {name!r}, got none in this call.\n"
                    "An amortized guide reads the observations. Try one of the following fixes:\n"
                    "- pass them to the call\n- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
                )
        # Of sites that only recognize a call, nothing more is asked.
        read = [] if wanted.optional else [*values]
        for name in [*read, *(name for name in wanted.latents if name in trace.nodes)]:
            site = trace.nodes[name]
            mask = site_mask(site)
            if mask is not None:
                masks[name] = mask
            if is_scaled(site):
                scales[name] = site["scale"]
    return Found(given.found, values, masks, scales), given, trace


class _Slice:
    """The operations that lead from the arguments to what the model works on."""

    def __init__(self, found: Found, drawn: dict[str, tuple[int, int]], plain: dict[str, float], replay: Replay, keep):
        self.drawn, self._found, self._plain, self._replay, self._keep = drawn, found, plain, replay, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> Found:
        given, found = iter(self._replay([*leaves, *(rows.get(name) for name in self.drawn)])), self._found
        return Found(
            {name: Rows(of.size, next(given)) for name, of in found.rows.items()},
            {name: next(given) for name in found.values},
            {name: replace(mask, values=next(given)) for name, mask in found.masks.items()},
            {name: next(given) / self._plain[name] for name in found.scales},
        )


class _Rerun:
    """Runs the model again at every call: slow, and always right."""

    def __init__(self, model, wanted: _Wanted, drawn: dict[str, tuple[int, int]], keep):
        self._run = lambda args, kwargs, rows: _run(model, wanted, args, kwargs, rows=rows, seed=0)
        self._wanted, self.drawn, self._keep = wanted, drawn, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> Found:
        if torch.jit.is_tracing():
            raise ValueError(
                f"Expected the rows and observed values of {self._wanted} to be traced to the arguments of the model for a "
                "Jit ELBO, which would otherwise keep those of its first call.\n"
                "Pass the data as tensor arguments, tell the guide what to read (inputs=lambda *args, **kwargs: ...), or use "
                "the ELBO without Jit."
            )
        found, given, trace = self._run(args, kwargs, rows)
        if given.drawn != self.drawn:
            raise ValueError(
                f"Expected {self._wanted} to draw its rows as in the first call, (N, B) = {self.drawn}, got {given.drawn}.\n"
                "Pass the data as arguments of the model, so that a call with other data is seen as one."
            )
        plain = _plain_scales(trace, found)
        return replace(found, scales={name: scale / plain[name] for name, scale in found.scales.items()})


def _plain_scales(trace, found: Found) -> dict[str, float]:
    """By scaled site what its plates alone account for."""
    return {name: plate_scale(trace.nodes[name]["cond_indep_stack"]) for name in found.scales}


def _targets(found: Found) -> list[Any]:
    masks = (mask.values for mask in found.masks.values())
    return [*(rows.index for rows in found.rows.values()), *found.values.values(), *masks, *found.scales.values()]


def _trace_back(model, wanted: _Wanted, args, kwargs, warn) -> _Slice | _Rerun:
    recorder = Recorder()
    # Under new identities: the model may also hold an argument itself, or be given one tensor in two places.
    args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    found, given, trace = _run(model, wanted, args, kwargs, rows={}, seed=0, recorder=recorder)
    of_latents, reader = follow(recorder.calls, _latent_values(trace))
    for name, mask in found.masks.items():
        if id(mask.values) in of_latents:
            raise _following_mask(name, is_latent(trace.nodes[name]))
    # A mask that depends on a latent by way of a Python value may be the same in two runs.
    for seed in range(2, 10) if reader is not None else ():
        _check_masks_repeat(trace, found, _run(model, wanted, args, kwargs, rows=given.rows, seed=seed)[0])
    again, _, _ = _run(model, wanted, args, kwargs, rows=given.rows, seed=1)
    if wanted.optional:
        # A value that the model draws or computes is no data.
        found, again = _repeated(found, again), _repeated(again, found)
        if given.drawn:
            found, again = replace(found, values={}), replace(again, values={})
    _check_repeats(wanted, found, again)
    # The objects whose identity is part of the signature must outlive it.
    leaves, _ = _flatten(args, kwargs)
    keep = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    inputs = [*leaves, *(given.rows[name] for name in given.drawn)]
    plain = _plain_scales(trace, found)

    def sliced(found: Found) -> _Slice:
        slice_ = _Slice(found, given.drawn, plain, Replay(recorder, inputs, _targets(found)), keep)
        replayed = slice_._replay(inputs)
        if not _same(replayed, _targets(found)):
            raise CannotReplayError("its operations do not repeat")
        return slice_

    try:
        return sliced(found)
    except CannotReplayError as error:
        reason = error
    if wanted.optional:
        found = replace(found, values={})
        wanted = replace(wanted, sites=())
        try:
            return sliced(found)
        except CannotReplayError as error:
            reason = error
    warn(
        f"The rows{_and(wanted.sites)} of {wanted} could not be traced to the model's arguments ({reason}), so every call runs "
        "the model once more to read them.\n"
        "Pass the data as tensor arguments, or tell the guide what to read: inputs=lambda *args, **kwargs: ..."
    )
    return _Rerun(model, wanted, given.drawn, keep)


def _latent_values(trace) -> list[Tensor]:
    return [
        site["value"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    ]


def _check_masks_repeat(trace, found: Found, again: Found) -> None:
    for name in {*found.masks, *again.masks}:
        pair = [each.masks.get(name, Mask(True)).values for each in (found, again)]
        if not _equal(*pair):
            raise _following_mask(name, is_latent(trace.nodes[name]))


def _following_mask(name: str, latent: bool) -> ValueError:
    if latent:
        return ValueError(
            f"Expected a mask of latent {name!r} that does not depend on latents, got one that does.\n"
            "A guide leaves out what the model leaves out, and a guide's rows cannot know the latents that it is about to "
            "draw. Try one of the following fixes:\n"
            "- mask by the data, or by an argument of the model\n"
            f"- leave {name!r} without a mask, and what depends on it with one: latents that nothing depends on keep their "
            "prior"
        )
    return ValueError(
        f"Expected a mask of observed site {name!r} that does not depend on latents, got one that does: the encoder cannot "
        "read it.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
    )


def _and(sites: Sequence[str]) -> str:
    return f" and observed values {list(sites)}" if sites else ""


def _repeated(found: Found, again: Found) -> Found:
    values = {name: value for name, value in found.values.items() if _same([value], [again.values.get(name)])}
    return replace(found, values=values)


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two lists of tensors and numbers are equal."""
    return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _check_repeats(wanted: _Wanted, found: Found, again: Found) -> None:
    names = [
        ({name: rows.size for name, rows in each.rows.items()}, *map(list, (each.values, each.masks, each.scales)))
        for each in (found, again)
    ]
    if names[0] != names[1] or not _same(_targets(found), _targets(again)):
        raise ValueError(
            f"Expected the same rows, observed values, masks and scales of {wanted} in two runs of the model on the same "
            "arguments, got different ones.\nA guide cannot know rows or data that the model draws at random. Draw them "
            "outside and pass them as arguments, or use pyro.plate(name, size, subsample_size=...)."
        )
