"""The arguments of a call as a list of tensors, and what of the others a graph depends on."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_avi.compilation.fallback import CannotCompile

__all__ = ["flatten_call"]


def flatten_call(call: tuple, kwargs: Mapping[str, Any]) -> tuple[list, Any, tuple]:
    """The leaves of the arguments, their tree, and their signature: calls with equal signatures can use one graph.

    Raises:
        CannotCompile: if an argument other than a tensor is mutable, as an array or a namespace.
    """
    # The fast case: torch's tree_flatten takes as long as a small graph.
    plain = not kwargs and all(isinstance(x, Tensor) for x in call)
    leaves, tree = (list(call), len(call)) if plain else tree_flatten((call, dict(kwargs)))
    known = (
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else _checked_constant(x) for x in leaves
    )
    return leaves, tree, (tree, *known)


def _checked_constant(leaf: Any) -> Any:
    """An argument that is no tensor, if it is immutable: its value becomes a constant of the graph."""
    try:
        hash(leaf)
    except TypeError:
        changes = True
    else:
        # An object that is equal only to itself may change its attributes. Functions and modules are taken as constants.
        changes = type(leaf).__eq__ is object.__eq__ and not callable(leaf) and not isinstance(leaf, _CONSTANTS)
    if changes:
        raise CannotCompile(
            f"an argument is a {type(leaf).__name__}, whose content may change from step to step; pass tensors and numbers"
        )
    return leaf


_CONSTANTS = (Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(...))
