"""The signature of a call: everything about its arguments but the content of tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["describe_leaf", "flatten"]

_PLAIN = (Tensor, bool, int, float, str, type(None))


def flatten(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of the arguments, and a key of how they are nested."""
    # torch's walk through nests takes longer than all else that a guide has to find out about a call.
    if all(isinstance(x, _PLAIN) for x in args) and all(isinstance(x, _PLAIN) for x in kwargs.values()):
        return [*args, *kwargs.values()], (len(args), *kwargs)
    leaves, structure = tree_flatten((args, kwargs))
    return leaves, repr(structure)


def describe_leaf(leaf) -> tuple:
    """The part of a signature that describes one leaf."""
    if isinstance(leaf, Tensor):
        # Strides of 0 tell that a mask is the same for all elements of an event.
        return leaf.shape, leaf.dtype, leaf.device, leaf.is_contiguous() or leaf.stride()
    # Other objects are told apart by identity; the reader that belongs to them keeps them alive.
    return type(leaf), leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)
