"""Where a model's rows and observed values come from: recorded once, sliced, replayed at every later call.

Looking for the model's data among its arguments by identity fails as soon as the model writes ``x.float()``, ``x / 255``
or ``x[index]``. So the first call of a signature runs the model once under a recorder of tensor operations, walks back
from the rows and observed values to the arguments, and keeps those operations alone: nothing for ``obs=x``, one division
for ``obs=x / 255``. The likelihood is never run again.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_avi.structure import quiet

__all__ = ["Found", "Sources"]


@dataclass(frozen=True)
class Found:
    """What one call of the model works on.

    Attributes:
        size: the number ``N`` of rows of the plate.
        index: ``[B]`` the rows of this call, ``None`` for all of them in order.
        values: the observed values by site.
    """

    size: int
    index: Tensor | None
    values: dict[str, Tensor]


class Sources:
    """Finds the rows of a plate and the values observed in it, for any call of one model.

    Args:
        model: any Pyro callable.
        plate: the name of the plate.
        sites: the observed sites to read.
    """

    # More signatures than that come from a Python number that changes every step.
    max_signatures = 64

    def __init__(self, model: Callable, plate: str, sites: Sequence[str]):
        self._model, self._plate, self._sites = model, plate, tuple(sites)
        self._slices: dict[tuple, _Slice | _Rerun] = {}

    def draws_rows(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
        """``(N, B)`` where the model draws ``B`` of its ``N`` rows itself (``subsample_size=``), else ``None``."""
        return self._slice(args, kwargs).drawn

    def read(self, args: tuple, kwargs: Mapping[str, Any], rows: Tensor | None = None) -> Found:
        """What a call with these arguments works on.

        Args:
            args, kwargs: the arguments of the model.
            rows: ``[B]`` the rows drawn in the model's stead, where it draws its rows itself.

        Raises:
            ValueError: if the model gives other rows or values when it is run again, or lacks an observation.
        """
        return self._slice(args, kwargs).read(args, kwargs, rows)

    def _slice(self, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        signature = tuple(map(_describe, leaves))
        if signature not in self._slices:
            if len(self._slices) == self.max_signatures:
                warnings.warn(
                    f"The model was called with more than {self.max_signatures} kinds of arguments, and each is analysed "
                    "anew. Pass a number that changes from step to step as a 0-dimensional tensor.",
                    stacklevel=2,
                )
                self._slices.clear()
            self._slices[signature] = _trace_back(self._model, self._plate, self._sites, args, kwargs)
        return self._slices[signature]


def _describe(leaf):
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    # Other objects are told apart by identity; the slice that belongs to them keeps them alive.
    return leaf if isinstance(leaf, bool | int | float | str | None) else (type(leaf), id(leaf))


class _GiveRows(Messenger):
    """Provide the rows that a plate would otherwise draw, and note how it got its rows."""

    def __init__(self, plate: str, rows: Tensor | None):
        super().__init__()
        self.plate, self.rows = plate, rows
        self.size, self.index, self.drawn = 0, None, None

    def _pyro_sample(self, msg):
        if msg["name"] != self.plate or not site_is_subsample(msg):
            return
        self.size = msg["fn"].size
        if msg["value"] is not None:
            self.index = msg["value"]
        elif msg["fn"].subsample_size is not None and msg["fn"].subsample_size < self.size:
            self.drawn = (self.size, msg["fn"].subsample_size)
            if self.rows is None:
                self.rows = msg["fn"].sample()
            self.index = msg["value"] = self.rows


def _run(model, plate, sites, args, kwargs, *, rows=None, seed, recorder=None):
    """Run the model beside the program; return what it worked on and how its rows came about."""
    given = _GiveRows(plate, rows)
    # Validation would read data (`valid.all()`), which is no part of the model.
    with quiet(seed), pyro.validation_enabled(False), given, recorder or nullcontext():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    values = {}
    for name in sites:
        site = trace.nodes.get(name)
        if site is None or not site["is_observed"]:
            raise ValueError(
                f"Expected an observed value at site {name!r}, got none in this call.\n"
                "An amortized guide reads the observations. Try one of the following fixes:\n"
                "- pass them to the call\n- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
            )
        values[name] = site["value"]
    return Found(given.size, given.index, values), given


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@dataclass(frozen=True)
class _Call:
    """One tensor operation of a recorded run; ``changed`` are its arguments that it wrote to."""

    func: Callable
    args: tuple
    kwargs: dict
    out: Any
    changed: list[Tensor]

    @property
    def name(self) -> str:
        return getattr(self.func, "__name__", str(self.func))


class _Recorder(TorchFunctionMode):
    """Keep every tensor operation with its inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        versions = [x._version for x in inputs]
        out = func(*args, **kwargs)
        changed = [x for x, version in zip(inputs, versions, strict=True) if x._version != version]
        self.calls.append(_Call(func, args, kwargs, out, changed))
        return out


class _CannotReplay(Exception):
    """Why an observed value is not a function of the arguments alone."""


class _Slice:
    """The operations that lead from the arguments to the rows and observed values."""

    def __init__(self, found: Found, drawn, steps, slots, targets, keep):
        self.drawn, self._size = drawn, found.size
        self._steps, self._slots, self._targets = steps, slots, targets
        self._keep = keep

    def read(self, args, kwargs, rows=None) -> Found:
        leaves = tree_leaves((args, kwargs))
        known = {key: rows if position is None else leaves[position] for key, position in self._slots.items()}

        def now(x):
            return known.get(id(x), x) if isinstance(x, Tensor) else x

        with torch.no_grad():
            for call in self._steps:
                result = call.func(*tree_map(now, call.args), **tree_map(now, call.kwargs))
                for old, new in zip(tree_leaves(call.out), tree_leaves(result), strict=True):
                    known[id(old)] = new
        index, values = self._targets
        return Found(self._size, now(index), {name: now(value) for name, value in values.items()})


class _Rerun:
    """Runs the model again at every call: slow, and always right."""

    def __init__(self, model, plate, sites, drawn, keep):
        self._run = lambda args, kwargs, rows: _run(model, plate, sites, args, kwargs, rows=rows, seed=0)[0]
        self.drawn, self._keep = drawn, keep

    def read(self, args, kwargs, rows=None) -> Found:
        return self._run(args, kwargs, rows)


def _trace_back(model, plate, sites, args, kwargs) -> _Slice | _Rerun:
    recorder = _Recorder()
    found, given = _run(model, plate, sites, args, kwargs, seed=0, recorder=recorder)
    again, _ = _run(model, plate, sites, args, kwargs, rows=given.rows, seed=1)
    _check_repeats(plate, found, again)
    leaves = tree_leaves((args, kwargs))
    slots = {id(leaf): position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    if given.drawn is not None:
        slots[id(given.rows)] = None
    # The objects whose identity is part of the signature or of the slots must outlive it.
    keep = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    targets = (found.index, found.values)
    try:
        steps = _slice_back(recorder.calls, slots, tree_leaves(targets))
        sliced = _Slice(found, given.drawn, steps, slots, targets, (keep, recorder.calls if steps else None))
        replayed = sliced.read(args, kwargs, given.rows)
        if not _same(replayed, found):
            raise _CannotReplay("its operations do not repeat")
    except _CannotReplay as reason:
        warnings.warn(
            f"The rows and observed values {list(sites)} of plate {plate!r} could not be traced to the model's arguments "
            f"({reason}), so every call runs the model once more to read them.\n"
            "Pass the data as tensor arguments, or tell the guide what to read: inputs=lambda *args, **kwargs: ...",
            stacklevel=2,
        )
        return _Rerun(model, plate, sites, given.drawn, keep)
    return sliced


# What turns the content of a tensor into a Python value, which a replay could not follow.
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "array", "contains")
}


def _slice_back(calls: list[_Call], slots, targets) -> list[_Call]:
    """The calls that the targets depend on, in order; raises where one of them cannot be replayed."""
    from_arguments = set(slots)
    for call in calls:
        if from_arguments & {id(x) for x in _tensors((call.args, call.kwargs))}:
            if call.name in _READS:
                raise _CannotReplay(f"the model reads data into Python by {call.name}")
            from_arguments |= {id(x) for x in _tensors(call.out)}
    needed = {id(x) for x in targets if isinstance(x, Tensor)} - set(slots)
    tracked = needed | set(slots)
    steps = []
    for call in reversed(calls):
        inputs, outputs = _tensors((call.args, call.kwargs)), {id(x) for x in _tensors(call.out)}
        if tracked & {id(x) for x in call.changed}:
            raise _CannotReplay(f"{call.name} changes a tensor in place")
        # An operation that returns its argument as it is (`x.float()` of floats) leaves nothing to replay.
        made = outputs - {id(x) for x in inputs}
        if made & needed:
            needed = (needed - made) | ({id(x) for x in inputs} - set(slots))
            tracked |= needed
            steps.append(call)
    if needed:
        raise _CannotReplay("a tensor among them is no argument of the model")
    return steps[::-1]


def _same(one: Found, two: Found) -> bool:
    pairs = [(one.index, two.index), *((one.values[name], two.values[name]) for name in one.values)]
    return one.size == two.size and all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)) for a, b in pairs
    )


def _check_repeats(plate: str, found: Found, again: Found) -> None:
    if not _same(found, again):
        raise ValueError(
            f"Expected the same rows and observed values of plate {plate!r} in two runs of the model on the same arguments, "
            "got different ones.\nA guide cannot know rows or data that the model draws at random. Draw them outside and pass "
            "them as arguments, or use pyro.plate(name, size, subsample_size=...)."
        )
