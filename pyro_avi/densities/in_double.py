"""Programs of single precision run in double precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["in_double"]

_LOW = (torch.float32, torch.float16, torch.bfloat16)


class _InDouble(TorchFunctionMode):
    """Give every operation its tensors in double precision, wherever a model keeps them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Run the operation."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # What writes to a tensor has to be given that tensor and no copy.
        in_place = name.endswith("_") and not name.endswith("__") or name in ("__setitem__", "__set__")
        if not in_place and _has_low((args, kwargs)):
            args, kwargs = tree_map(_double, (args, kwargs))
        return func(*args, **kwargs).double() if name == "float" else func(*args, **kwargs)


def _has_low(part: Any) -> bool:
    if isinstance(part, Tensor):
        with torch._C.DisableTorchFunction():
            return part.dtype in _LOW
    if isinstance(part, tuple | list):
        return any(map(_has_low, part))
    return isinstance(part, dict) and any(map(_has_low, part.values()))


def _double(part: Any) -> Any:
    if not isinstance(part, Tensor):
        return part
    with torch._C.DisableTorchFunction():
        # No gradients of parameters are asked for.
        return (part.detach() if part.is_leaf else part).double() if part.dtype in _LOW else part


@contextmanager
def in_double() -> Iterator[None]:
    """A context in which tensors are made, and operations work, in double precision; modules keep their parameters.

    What is written in place keeps its precision.

    Example::

        >>> import torch
        >>> from pyro_avi.densities.in_double import in_double
        >>> layer = torch.nn.Linear(2, 3)
        >>> with in_double():
        ...     out = layer(torch.ones(1, 2))
        >>> out.dtype, layer.weight.dtype
        (torch.float64, torch.float32)
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InDouble():
            yield
    finally:
        torch.set_default_dtype(before)
