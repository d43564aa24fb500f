"""What decides the numbers of a training, as plain data, and in what two trainings differ."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

__all__ = ["differences", "digest", "named", "plain_part", "rates_by_step"]

Settings = Mapping[str, Any]


def rates_by_step(rates: Callable[[int], Sequence[float]], num_steps: int) -> dict[str, list[float]]:
    """The learning rates at steps that tell schedules apart: 0, 1, 2, 4, ... and the last one.

    Args:
        rates: the learning rates of a step.
        num_steps: the number of steps.
    """
    steps = {0, *(2**power for power in range((num_steps - 1).bit_length())), num_steps - 1}
    return {str(step): [float(rate) for rate in rates(step)] for step in sorted(steps) if step < num_steps}


def named(value: Any) -> str:
    """The name of the class of an object; of a function or a method its own."""
    value = getattr(value, "func", value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def plain_part(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are plain data."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_plain, value))
        return value is None or isinstance(value, bool | int | float | str)

    return {name: list(x) if isinstance(x, tuple) else x for name, x in options.items() if is_plain(x)}


def digest(arguments: Any) -> str:
    """A hash of the arguments of a call, the same on every device: of their tensors, arrays and numbers, else of their class.

    Example::

        >>> import torch
        >>> from pyro_avi.checkpoints.settings import digest
        >>> digest((torch.ones(3), 1)) == digest((torch.ones(3), 1)) != digest((torch.ones(3), 2))
        True
    """
    leaves, tree = tree_flatten(arguments)
    found = hashlib.sha256(str(tree).encode())
    for leaf in leaves:
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            leaf = torch.as_tensor(leaf.copy())
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
            found.update(f"{tuple(leaf.shape)} {leaf.dtype}".encode())
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif leaf is None or isinstance(leaf, bool | int | float | complex | str):
            found.update(repr(leaf).encode())
        else:
            found.update(named(leaf).encode())
    return found.hexdigest()


def differences(begun: Settings, mine: Settings) -> list[str]:
    """In what a training differs from one that was begun before, a sentence each.

    Args:
        begun: the settings of the one.
        mine: those of the other, by the same names.
    """
    return [f"{name} {_told(begun.get(name), mine[name])}" for name in mine if not _equal(begun.get(name), mine[name])]


def _equal(one: Any, other: Any) -> bool:
    # Of schedules the steps that both have: a training may be given more steps than it was begun with.
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return all(_equal(one[name], other[name]) for name in one.keys() & other.keys())
    return one == other


def _told(one: Any, other: Any) -> str:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        name = next(name for name in other if name in one and not _equal(one[name], other[name]))
        where = f"at step {name} " if name.isdecimal() else f"({name}) "
        return where + _told(one[name], other[name])
    if isinstance(one, str) and len(one) == len(hashlib.sha256().hexdigest()):
        return "has other values"
    return f"was {_shown(one)}, is {_shown(other)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return value if isinstance(value, str) else repr(value)
