"""Tensors among the arguments of a model: where they are, whether they are positions or kinds, and with rows exchanged."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import SequenceKey, key_get, keystr, tree_leaves

from pyro_avi.calls.replay import Recorder
from pyro_avi.inspection.sites import equal

__all__ = ["Argument", "argument_at", "shuffled", "signature_text", "used_as_index", "with_another_row"]


@dataclass(frozen=True)
class Argument:
    """A tensor among the arguments of a model, which may be nested.

    Attributes:
        name: as in the model's signature, e.g. ``exposure`` or ``batch['exposure']``.
        position: of the argument that holds it, where it can be given by position.
        keyword: its keyword.
        path: where it is in that argument.
    """

    name: str
    position: int | None
    keyword: str | None
    path: tuple

    def value_in(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The tensor in a call.

        Raises:
            ValueError: if the call has none.
        """
        if self.position is not None and self.position < len(args):
            value = args[self.position]
        else:
            value = None if self.keyword is None else kwargs.get(self.keyword)
        try:
            value = key_get(value, self.path) if self.path else value
        except (KeyError, IndexError, TypeError, AttributeError):
            value = None
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected argument {self.name} of the model as a tensor, as in the first call, got {type(value).__name__}.\n"
                "The encoder reads it along with the observations. Try one of the following fixes:\n"
                "- pass it to this call too\n- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
            )
        return value


def argument_at(model: Callable, path: tuple) -> Argument:
    """The argument of a model that is at a place of ``(args, kwargs)``.

    Args:
        model: any Pyro callable, whose signature has the names.
        path: as given by ``torch.utils._pytree.tree_flatten_with_path``.
    """
    at: Any
    (of_kwargs, at), rest = (part.idx if isinstance(part, SequenceKey) else part.key for part in path[:2]), path[2:]
    try:
        parameters = [*inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    by_position = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if of_kwargs:
        position, keyword = by_position.index(at) if at in by_position else None, at
    else:
        position, keyword = at, by_position[at] if at < len(by_position) else None
    return Argument((keyword or f"args[{position}]") + keystr(rest), position, keyword, rest)


def signature_text(model: Callable) -> str:
    """The names of the arguments of a model as they stand in its signature."""
    try:
        return ", ".join(inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters)
    except (TypeError, ValueError):
        return "*args, **kwargs"


# Operations that use whole numbers as indices or categories.
_INDEXING = {
    "__getitem__",
    "__setitem__",
    "index_select",
    "index_add",
    "index_add_",
    "gather",
    "take",
    "take_along_dim",
}
_INDEXING |= {
    "scatter",
    "scatter_add",
    "embedding",
    "one_hot",
    "bincount",
    "repeat_interleave",
    "eq",
    "ne",
    "__eq__",
    "__ne__",
}
_INDEXING |= {"item", "tolist", "numpy", "unique", "__index__", "__int__", "__array__", "__contains__"}

# Those whose first argument is indexed, so that only the others are indices.
_INDEXED = {"__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim"}

# Operations that return the same numbers in another form.
_SAME = {"long", "int", "to", "type", "float", "double", "type_as", "clone", "detach", "contiguous"}
_SAME |= {"view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "t", "transpose"}


def used_as_index(recorder: Recorder, numbers: Tensor) -> bool:
    """Whether a run used whole numbers as indices or categories: to index, to compare for equality, or in Python.

    Args:
        recorder: what the run did.
        numbers: the tensor that it was given.
    """
    same = {id(numbers)}
    for call in recorder.calls:
        # The tensor that is indexed is not an index.
        used = call.args[1:] if call.name in _INDEXED else call.args
        if same & {id(x) for x in tree_leaves((used, call.kwargs)) if isinstance(x, Tensor)}:
            if call.name in _INDEXING:
                return True
            if call.name in _SAME:
                same.add(id(call.out))
        if call.name in _INDEXED and id(call.args[0]) in same:
            same.add(id(call.out))
    return False


def with_another_row(values: Tensor, dim: int, at: int) -> Tensor:
    """Values with another of their rows in the place of one; where all are alike, with other values there.

    Args:
        values: any tensor.
        dim: the dimension of its rows.
        at: the position of the row.
    """
    rows = values.movedim(dim, 0)
    differs = (rows != rows[at]).reshape(len(rows), -1).any(-1)
    place = torch.tensor([at], device=values.device)
    other = int(differs.int().argmax())
    row = values.narrow(dim, other, 1) if differs.any() else _changed(values.narrow(dim, at, 1))
    return values.index_copy(dim, place, row)


def shuffled(values: Tensor) -> Tensor:
    """The elements in another order; different elements if all are equal."""
    rolled = values.flatten().roll(1).view(values.shape)
    return _changed(values) if equal(rolled, values) else rolled


def _changed(values: Tensor) -> Tensor:
    if values.dtype == torch.bool:
        return ~values
    return (1.1 * values + 0.1 if values.is_floating_point() else values + 1).to(values.dtype)
