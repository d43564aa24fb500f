"""Tensor operations recorded in one run, cut down to those that lead from inputs to targets, and replayed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["CannotReplayError", "Recorder", "Replay", "dependents"]


class CannotReplayError(Exception):
    """The targets of a run are not a function of its inputs alone."""


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

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))


def _tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Recorder(TorchFunctionMode):
    """Keep every tensor operation with its inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the operation and keep it."""
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        versions = [x._version for x in inputs]
        out = func(*args, **kwargs)
        changed = [x for x, version in zip(inputs, versions, strict=True) if x._version != version]
        self.calls.append(_Call(func, args, kwargs, out, changed))
        return out


class Replay:
    """The targets of a recorded run as a function of its inputs.

    Args:
        recorder: what the run did.
        inputs: the tensors and other objects that the run started from.
        targets: the tensors and other objects that the run ended with.

    Raises:
        CannotReplayError: if the targets depend on anything else, or on Python values read from tensors.
    """

    def __init__(self, recorder: Recorder, inputs: Sequence[Any], targets: Sequence[Any]):
        self._targets = list(targets)
        self._slots = {id(x): position for position, x in enumerate(inputs) if isinstance(x, Tensor)}
        self._steps = _slice_back(recorder.calls, inputs, _tensors(targets))
        # Most models observe their arguments as they are.
        self._direct = None if self._steps else [self._slots.get(id(x)) for x in self._targets]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        """The targets for other inputs of the same kinds."""
        if self._direct is not None:
            pairs = zip(self._direct, self._targets, strict=True)
            return [target if position is None else inputs[position] for position, target in pairs]
        known = {key: inputs[position] for key, position in self._slots.items()}

        def now(x):
            return known.get(id(x), x) if isinstance(x, Tensor) else x

        with torch.no_grad():
            for call in self._steps:
                result = call.func(*tree_map(now, call.args), **tree_map(now, call.kwargs))
                for old, new in zip(tree_leaves(call.out), tree_leaves(result), strict=True):
                    known[id(old)] = new
        return [now(x) for x in self._targets]


# What turns the content of a tensor into a Python value or into a size, which a replay could not follow.
_READS = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr"}
_READS |= {f"__{name}__" for name in ("bool", "int", "float", "complex", "index", "array", "contains")}
_READS |= {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave"}

# What makes tensors of Python objects. That a list of numbers has changed would not be seen.
_MAKES = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}

_FIXED: tuple[type, ...] = (bool, int, float, complex, str, type(None), type(...), type, torch.Size)
_FIXED += (torch.dtype, torch.device, torch.layout, torch.memory_format)


def _slice_back(calls: list[_Call], inputs: Sequence[Any], targets: list[Tensor]) -> list[_Call]:
    """The calls that the targets depend on, in order."""
    given = {id(x) for x in inputs if isinstance(x, Tensor)}
    _, read_by = dependents(calls, [x for x in inputs if isinstance(x, Tensor)])
    if read_by is not None:
        raise CannotReplayError(f"the model reads data into Python by {read_by}")
    needed = {id(x) for x in targets} - given
    # Views share their storage: what is written to one of them changes the others.
    tracked = _storages([x for x in inputs if isinstance(x, Tensor)] + targets)
    steps = []
    for call in reversed(calls):
        if tracked & _storages(call.changed):
            raise CannotReplayError(f"{call.name} changes a tensor in place")
        # An operation that returns its argument as it is (`x.float()` of floats) leaves nothing to replay.
        made = {id(x) for x in _tensors(call.out)} - {id(x) for x in call.inputs}
        if made & needed:
            _check_arguments(call, inputs)
            needed = (needed - made) | ({id(x) for x in call.inputs} - given)
            tracked |= _storages(call.inputs)
            steps.append(call)
    if needed:
        raise CannotReplayError("a tensor among them is no argument of the model")
    return steps[::-1]


def _storages(tensors: list[Tensor]) -> set[int]:
    # Two storages may share memory, as those of one array; without memory, as in runs by shapes alone, all would.
    storages = [x.untyped_storage() for x in tensors]
    return {storage.data_ptr() or storage._cdata for storage in storages}


def dependents(calls: Sequence[_Call], start: Sequence[Tensor]) -> tuple[set[int], str | None]:
    """The tensors of a run whose content depends on some others.

    Returns:
        The identities of all tensors whose content may depend on them, themselves included, and the name of an operation
        that turned such content into a Python value or a size, if there was one.
    """
    made, read_by = {id(x) for x in start}, None
    for call in calls:
        if not made & {id(x) for x in call.inputs}:
            continue
        selected = _tensors(call.args[1:]) if call.name == "__getitem__" else []
        if call.name in _READS or any(x.dtype in (torch.bool, torch.uint8) for x in selected):
            read_by = read_by or call.name
        # The others take the shape of their argument and nothing else.
        if not call.name.endswith("_like") and not call.name.startswith("new_"):
            made |= {id(x) for x in (*_tensors(call.out), *call.changed)}
    return made, read_by


def _check_arguments(call: _Call, inputs: Sequence[Any]) -> None:
    """Raise an error for an operation on objects that can change unnoticed."""
    if call.name in _MAKES and isinstance(call.args[0], list | tuple):
        raise CannotReplayError(f"{call.name} makes a tensor from a {type(call.args[0]).__name__}")
    for leaf in tree_leaves((call.args, call.kwargs)):
        for part in (leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,):
            if part is leaf and isinstance(leaf, Tensor):
                continue
            if not isinstance(part, _FIXED) and not any(part is x for x in inputs):
                raise CannotReplayError(
                    f"{call.name} works on a {type(part).__name__} that is no argument of the model"
                )
