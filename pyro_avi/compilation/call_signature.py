"""What a graph depends on of the arguments of a call."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_avi.compilation.fallback import CannotCompile

__all__ = ["flatten_call"]


def flatten_call(call: tuple, kwargs: Mapping[str, Any]) -> tuple[list, Any, tuple]:
    """The leaves of the arguments, their tree, and what a graph depends on of them.

    Raises:
        CannotCompile: if an argument may change without becoming another, as an array or a namespace.
    """
    # torch's walk through nests takes as long as a small graph.
    plain = not kwargs and all(isinstance(x, Tensor) for x in call)
    leaves, tree = (list(call), len(call)) if plain else tree_flatten((call, dict(kwargs)))
    known = (
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else _checked_constant(x) for x in leaves
    )
    return leaves, tree, (tree, *known)


def _checked_constant(leaf: Any) -> Any:
    """An argument that is no tensor, if it is what it is for ever: its value becomes part of the graph."""
    try:
        hash(leaf)
    except TypeError:
        changes = True
    else:
        # Equal only to itself: it may have other attributes tomorrow. Functions and modules are what is called.
        changes = type(leaf).__eq__ is object.__eq__ and not callable(leaf) and not isinstance(leaf, _CONSTANTS)
    if changes:
        raise CannotCompile(
            f"an argument is a {type(leaf).__name__}, whose content may change from step to step; pass tensors and numbers"
        )
    return leaf


_CONSTANTS = (Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(...))
