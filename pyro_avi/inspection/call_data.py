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

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from pyro_avi.inspection.isolated_run import untraced
from pyro_avi.inspection.masks import Mask
from pyro_avi.inspection.model_run import CallData, DataQuery, Run, run_once
from pyro_avi.inspection.replay import CannotReplayError, Recorder, Replay, dependents
from pyro_avi.inspection.sites import equal, is_latent, is_observation, row_plates
from pyro_avi.rows.subsample import Subsample, check_positions

__all__ = ["CallData", "CallReader"]


class CallReader:
    """Finds the rows of plates and what a model observes, masks and scales in them, for any call of it.

    Python numbers that the model takes from elsewhere than its arguments count as fixed.

    Args:
        model: any Pyro callable.
        plates: the names of the plates.
        sites: the observed sites to read.
        latents: the latent sites whose masks and scales are to be known, and whether the call observes them.
        optional: whether the observed sites are only to recognize a call by: they are left out where it lacks them, hides
            where they come from, or draws its rows.
        unobserved: whether calls that observe something in the plates of the latents are refused.
        inputs: whether the guide can be told what to read, for the advice.
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
        unobserved: bool = False,
        inputs: bool = False,
    ):
        self._model = model
        self._query = DataQuery(tuple(plates), tuple(sites), tuple(latents), optional, unobserved, inputs)
        self._slices: dict[tuple, _Slice | _Rerun] = {}
        self._warned: set[str] = set()

    def __getstate__(self):
        # A slice knows its tensors by identity, which a copy has not.
        return {**self.__dict__, "_slices": {}}

    def draws_rows(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """``(N, B)`` of each plate of which the model draws ``B`` of ``N`` rows itself (``subsample_size=``)."""
        return self.call(args, kwargs).drawn

    def read(self, args: tuple, kwargs: Mapping[str, Any], rows: Mapping[str, Tensor] | None = None) -> CallData:
        """What a call with these arguments works on.

        Args:
            args, kwargs: the arguments of the model.
            rows: by plate the rows ``[B]`` drawn in the model's stead, where it draws its rows itself.

        Raises:
            ValueError: if the model gives other rows or values when it is run again, or lacks an observation.
        """
        return self.call(args, kwargs).read(rows or {})

    def call(self, args: tuple, kwargs: Mapping[str, Any], counts: Mapping[str, int] | None = None) -> "Call":
        """One call of the model, whose rows can be looked at before it is read.

        Args:
            args, kwargs: the arguments of the model.
            counts: by plate the number of rows ``B`` that somebody else takes of it, where the model would take all.
        """
        leaves, structure = _flatten(args, kwargs)
        signature = (structure, *map(_describe, leaves))
        if counts:
            signature = (*signature, *counts.items())
        with untraced() if torch.jit.is_tracing() else nullcontext():
            slice_ = self._slice(signature, args, kwargs, counts or {})
        return Call(slice_, args, kwargs, leaves)

    def _slice(self, signature, args, kwargs, counts):
        """How calls of this signature are read: everything about the arguments but the content of tensors."""
        if signature not in self._slices:
            if len(self._slices) == self.max_signatures:
                self._warn_once(
                    f"The model was called with more than {self.max_signatures} kinds of arguments, and each is analysed "
                    "anew. Pass a number that changes from step to step as a 0-dimensional tensor."
                )
                self._slices.clear()
            self._slices[signature] = _trace_back(self._model, self._query, args, kwargs, counts, self._warn_once)
        return self._slices[signature]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


@dataclass(frozen=True)
class Call:
    """A call of the model with its arguments."""

    _slice: "_Slice | _Rerun"
    _args: tuple
    _kwargs: Mapping[str, Any]
    _leaves: Sequence[Any]

    @property
    def drawn(self) -> dict[str, tuple[int, int]]:
        """As :meth:`CallReader.draws_rows`."""
        return self._slice.drawn

    @property
    def ignored(self) -> tuple[str, ...]:
        """Those of the plates that draw rows whose draw the model makes nothing of, though it observes something there."""
        return self._slice.ignored

    @property
    def traced(self) -> bool:
        """Whether any number of rows can be read, and not just as many as the model draws."""
        return isinstance(self._slice, _Slice)

    def read(self, rows: Mapping[str, Tensor]) -> CallData:
        """As :meth:`CallReader.read`."""
        data = self._slice.read(self._args, self._kwargs, rows, self._leaves)
        for name, subsample in data.rows.items():
            if subsample.index is not None and name not in self._slice.drawn:
                check_positions(name, subsample.size, subsample.index)
        return data


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


class _Slice:
    """The operations that lead from the arguments to what the model works on."""

    def __init__(self, run: Run, data: CallData, ignored: tuple[str, ...], replay: Replay, keep):
        self.drawn, self.ignored, self._data, self._plain = run.drawn, ignored, data, run.plain_scales
        self._replay, self._keep = replay, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> CallData:
        given, data = iter(self._replay([*leaves, *(rows.get(name) for name in self.drawn)])), self._data
        return CallData(
            {name: Subsample(subsample.size, next(given)) for name, subsample in data.rows.items()},
            {name: next(given) for name in data.values},
            {name: replace(mask, values=next(given)) for name, mask in data.masks.items()},
            {name: next(given) / self._plain[name] for name in data.scales},
            {name: next(given) for name in data.given},
        )


class _Rerun:
    """Runs the model again at every call: slow, and always right."""

    def __init__(self, model, query: DataQuery, counts: Mapping[str, int], run: Run, ignored: tuple[str, ...], keep):
        self._run = lambda args, kwargs, rows: run_once(model, query, args, kwargs, rows=rows, counts=counts, seed=0)
        self._query, self.drawn, self.ignored, self._keep = query, run.drawn, ignored, keep

    def read(self, args, kwargs, rows: Mapping[str, Tensor], leaves) -> CallData:
        if torch.jit.is_tracing():
            raise ValueError(
                f"Expected the rows and observed values of {self._query} to be traced to the arguments of the model for a "
                "Jit ELBO, which would otherwise keep those of its first call.\n"
                "Pass the data as tensor arguments, tell the guide what to read (inputs=lambda *args, **kwargs: ...), or use "
                "the ELBO without Jit."
            )
        others = {}
        for name, (size, count) in self.drawn.items():
            if name in rows and len(rows[name]) != count:
                others[name] = Subsample(size, rows[name])
                if not self._query.sites:
                    rows = {**rows, name: torch.arange(count, device=rows[name].device)}
                    continue
                raise ValueError(
                    f"Expected a call for {count} of the {size} rows of plate {name!r}, as many as the model draws, got one "
                    f"for {len(rows[name])}: what it observes in them could not be traced to its arguments, and it runs for "
                    "that many only.\nPass the data as tensor arguments, and the positions of the rows: "
                    f"pyro.plate({name!r}, {size}, subsample=index)."
                )
        run = self._run(args, kwargs, rows)
        if run.drawn != self.drawn:
            raise ValueError(
                f"Expected {self._query} to draw its rows as in the first call, (N, B) = {self.drawn}, got {run.drawn}.\n"
                "Pass the data as arguments of the model, so that a call with other data is seen as one."
            )
        if others:
            # Masks and scales of other rows would be needed for draws, which are for as many as the model draws.
            return CallData({**run.data.rows, **others}, {}, {}, {})
        plain = run.plain_scales
        scales = {name: scale / plain[name] for name, scale in run.data.scales.items()}
        return replace(run.data, scales=scales)


def _targets(data: CallData) -> list[Any]:
    masks = (mask.values for mask in data.masks.values())
    rows = (rows.index for rows in data.rows.values())
    return [*rows, *data.values.values(), *masks, *data.scales.values(), *data.given.values()]


def _trace_back(model, query: DataQuery, args, kwargs, counts, warn) -> _Slice | _Rerun:
    recorder = Recorder()
    # Under new identities: the model may also hold an argument itself, or be given one tensor in two places.
    args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    run = run_once(model, query, args, kwargs, rows={}, counts=counts, seed=0, recorder=recorder)

    def again(seed: int) -> CallData:
        return run_once(model, query, args, kwargs, rows=run.rows, counts=counts, seed=seed).data

    _check_followed(query, run, recorder, again)
    data, other = run.data, again(1)
    if query.optional:
        # A value that the model draws or computes is no data.
        data, other = _repeated(data, other), _repeated(other, data)
        if run.drawn:
            data, other = replace(data, values={}), replace(other, values={})
    _check_repeats(query, data, other)
    ignored = tuple(name for name in run.drawn if name not in counts and _ignores(run, recorder, name))
    # The objects whose identity is part of the signature must outlive it.
    leaves, _ = _flatten(args, kwargs)
    keep = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    inputs = [*leaves, *(run.rows[name] for name in run.drawn)]

    def sliced(data: CallData) -> _Slice:
        slice_ = _Slice(run, data, ignored, Replay(recorder, inputs, _targets(data)), keep)
        replayed = slice_._replay(inputs)
        if not _same(replayed, _targets(data)):
            raise CannotReplayError("its operations do not repeat")
        return slice_

    try:
        return sliced(data)
    except CannotReplayError as error:
        reason = error
    # Whether it is the observed values alone that hide where they come from.
    try:
        rest = sliced(replace(data, values={})) if data.values else None
    except CannotReplayError:
        rest = None
    if query.optional:
        if rest is not None:
            return rest
        query = replace(query, sites=())
    warn(_advice(query, data, rest is None, reason))
    return _Rerun(model, query, counts, run, ignored, keep)


def _advice(query: DataQuery, data: CallData, rows: bool, reason: Exception) -> str:
    """What to do where the model has to be run at every call, because of its rows or of its observed values alone."""
    if not query.plates:
        what = f"What masks and scales the {query}"
    else:
        sites = f"observed values {list(query.sites)}" if query.sites else ""
        what = f"The {' and '.join(['rows'] * rows + [sites] * bool(sites))} of {query}"
    fix = "Pass the data as tensor arguments"
    if query.inputs and not rows:
        fix += ", or tell the guide what to read: inputs=lambda *args, **kwargs: ..."
    elif query.inputs and not data.masks and not data.scales:
        fix += (
            ", or tell the guide both what to read, inputs=lambda *args, **kwargs: ..., and which rows, "
            "create_plates=lambda *args, **kwargs: pyro.plate(name, size, subsample=index)"
        )
    return (
        f"{what} could not be traced to the model's arguments ({reason}), so every call runs the model once more to read "
        f"them.\n{fix}"
    )


def _ignores(run: Run, recorder: Recorder, plate: str) -> bool:
    """Whether a model draws rows of a plate and makes nothing of them, though it observes something there."""
    made, reader = dependents(recorder.calls, [run.rows[plate]])
    return len(made) == 1 and reader is None and run.observes_in(plate)


def _check_followed(query: DataQuery, run: Run, recorder: Recorder, again: Callable[[int], CallData]) -> None:
    """Refuse masks that follow latents, and observations where there were none."""
    of_latents, reader = dependents(recorder.calls, run.latent_values)
    nodes = run.trace.nodes
    for name, mask in run.data.masks.items():
        if id(mask.values) in of_latents:
            raise _following_mask(name, is_latent(nodes[name]))
    # A mask that depends on a latent by way of a Python value may be the same in two runs.
    for seed in range(2, 10) if reader is not None else ():
        masks = again(seed).masks
        for name in {*run.data.masks, *masks}:
            if not _equal(*(each.get(name, Mask(True)).values for each in (run.data.masks, masks))):
                raise _following_mask(name, is_latent(nodes[name]))
    if query.unobserved and row_plates(run.trace):
        names = [name for name, site in nodes.items() if is_observation(site) and id(site["value"]) not in of_latents]
        if names:
            raise ValueError(
                f"Expected no observations, as in the call that this guide was set up with, got values at sites {names}.\n"
                "Without observations every latent was taken for a global one. Make a new guide and set it up with the "
                "data: guide.setup(*args)."
            )


def _following_mask(name: str, latent: bool) -> ValueError:
    if latent:
        return ValueError(
            f"Expected a mask of latent {name!r} that does not depend on latents, got one that does.\n"
            "A guide leaves out what the model leaves out, and it cannot know that before it has drawn the latents. Try one "
            "of the following fixes:\n"
            "- mask by the data, or by an argument of the model\n"
            f"- leave {name!r} without a mask, and mask what depends on it: where nothing does, it keeps its prior"
        )
    return ValueError(
        f"Expected a mask of observed site {name!r} that does not depend on latents, got one that does: the encoder cannot "
        "read it.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
    )


def _repeated(data: CallData, again: CallData) -> CallData:
    values = {name: value for name, value in data.values.items() if _same([value], [again.values.get(name)])}
    return replace(data, values=values)


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two lists of tensors and numbers are equal."""
    return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _check_repeats(query: DataQuery, data: CallData, again: CallData) -> None:
    names = [
        (
            {name: rows.size for name, rows in each.rows.items()},
            *map(list, (each.values, each.masks, each.scales, each.given)),
        )
        for each in (data, again)
    ]
    if names[0] != names[1] or not _same(_targets(data), _targets(again)):
        raise ValueError(
            f"Expected the same rows, observed values, masks and scales of {query} in two runs of the model on the same "
            "arguments, got different ones.\nA guide cannot know rows or data that the model draws at random. Draw them "
            "outside and pass them as arguments, or use pyro.plate(name, size, subsample_size=...)."
        )
