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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from pyro_avi.replay import CannotReplayError, Recorder, Replay
from pyro_avi.structure import equal, quiet

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

    Python numbers that the model takes from elsewhere than its arguments count as fixed.

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
        self._warned: set[str] = set()

    def __getstate__(self):
        # A slice knows its tensors by identity, which a copy has not.
        return {**self.__dict__, "_slices": {}}

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
        signature = _signature(args, kwargs)
        if signature not in self._slices:
            if len(self._slices) == self.max_signatures:
                self._warn_once(
                    f"The model was called with more than {self.max_signatures} kinds of arguments, and each is analysed "
                    "anew. Pass a number that changes from step to step as a 0-dimensional tensor."
                )
                self._slices.clear()
            self._slices[signature] = _trace_back(self._model, self._plate, self._sites, args, kwargs, self._warn_once)
        return self._slices[signature]

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)


def _signature(args, kwargs) -> tuple:
    """What decides how a call is analysed: everything about its arguments but the content of tensors."""
    leaves, structure = tree_flatten((args, kwargs))
    return repr(structure), *map(_describe, leaves)


def _describe(leaf) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.is_contiguous()
    # Other objects are told apart by identity; the slice that belongs to them keeps them alive.
    return type(leaf), leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)


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
            self.index = torch.as_tensor(msg["value"])
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


class _Slice:
    """The operations that lead from the arguments to the rows and observed values."""

    def __init__(self, found: Found, drawn, replay: Replay, keep):
        self.drawn, self._size, self._replay, self._keep = drawn, found.size, replay, keep

    def read(self, args, kwargs, rows=None) -> Found:
        return Found(self._size, *self._replay([*tree_leaves((args, kwargs)), rows]))


class _Rerun:
    """Runs the model again at every call: slow, and always right."""

    def __init__(self, model, plate, sites, drawn, keep):
        self._run = lambda args, kwargs, rows: _run(model, plate, sites, args, kwargs, rows=rows, seed=0)
        self._plate, self.drawn, self._keep = plate, drawn, keep

    def read(self, args, kwargs, rows=None) -> Found:
        found, given = self._run(args, kwargs, rows)
        if given.drawn != self.drawn:
            raise ValueError(
                f"Expected plate {self._plate!r} to draw its rows as in the first call, (N, B) = {self.drawn}, got "
                f"{given.drawn}.\nPass the data as arguments of the model, so that a call with other data is seen as one."
            )
        return found


def _trace_back(model, plate, sites, args, kwargs, warn) -> _Slice | _Rerun:
    recorder = Recorder()
    # Under new identities: the model may also hold an argument itself, or be given one tensor in two places.
    args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    found, given = _run(model, plate, sites, args, kwargs, seed=0, recorder=recorder)
    again, _ = _run(model, plate, sites, args, kwargs, rows=given.rows, seed=1)
    _check_repeats(plate, found, again)
    # The objects whose identity is part of the signature must outlive it.
    keep = [leaf for leaf in tree_leaves((args, kwargs)) if not isinstance(leaf, Tensor)]
    try:
        inputs = [*tree_leaves((args, kwargs)), given.rows]
        sliced = _Slice(found, given.drawn, Replay(recorder, inputs, (found.index, found.values)), keep)
        replayed = sliced.read(args, kwargs, given.rows)
        if not _same(replayed, found):
            raise CannotReplayError("its operations do not repeat")
    except CannotReplayError as reason:
        warn(
            f"The rows and observed values {list(sites)} of plate {plate!r} could not be traced to the model's arguments "
            f"({reason}), so every call runs the model once more to read them.\n"
            "Pass the data as tensor arguments, or tell the guide what to read: inputs=lambda *args, **kwargs: ..."
        )
        return _Rerun(model, plate, sites, given.drawn, keep)
    return sliced


def _same(one: Found, two: Found) -> bool:
    pairs = [(one.index, two.index), *((one.values[name], two.values[name]) for name in one.values)]
    return one.size == two.size and all(
        a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and equal(a, b)) for a, b in pairs
    )


def _check_repeats(plate: str, found: Found, again: Found) -> None:
    if not _same(found, again):
        raise ValueError(
            f"Expected the same rows and observed values of plate {plate!r} in two runs of the model on the same arguments, "
            "got different ones.\nA guide cannot know rows or data that the model draws at random. Draw them outside and pass "
            "them as arguments, or use pyro.plate(name, size, subsample_size=...)."
        )
