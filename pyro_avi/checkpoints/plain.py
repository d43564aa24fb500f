"""Nested states as plain data, which JSON can hold, with names in the place of tensors."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["flattened", "unflattened"]


def flattened(state: Any, owner: str) -> tuple[Any, dict[str, Tensor]]:
    """A state as plain data with names in the place of tensors, and the tensors by name.

    Args:
        state: mappings, lists and tuples of tensors, numbers, strings and ``None``.
        owner: what has the state, for messages.

    Raises:
        TypeError: if it holds anything else.

    Example::

        >>> import torch
        >>> from pyro_avi.checkpoints.plain import flattened, unflattened
        >>> plain, tensors = flattened({0: (torch.ones(2), 0.5)}, "an optimizer")
        >>> tensors
        {'state/0/0': tensor([1., 1.])}
        >>> unflattened(plain, tensors)
        {0: (tensor([1., 1.]), 0.5)}
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value
            return {"tensor": place}
        if isinstance(value, Mapping):
            # As pairs: keys in JSON are strings, and those of an optimizer's parameters are numbers.
            return {"items": [[key, plain(each, f"{place}/{key}")] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            parts = [plain(each, f"{place}/{at}") for at, each in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": parts}
        if value is None or isinstance(value, bool | int | float | str):
            return {"plain": value}
        raise TypeError(
            f"Expected {owner} whose state is tensors and numbers, to be saved, got a {type(value).__name__} at {place}."
        )

    return plain(state, "state"), tensors


def unflattened(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flattened`."""
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: unflattened(each, tensors) for key, each in value}
    if kind == "plain":
        return value
    parts = [unflattened(each, tensors) for each in value]
    return parts if kind == "list" else tuple(parts)
