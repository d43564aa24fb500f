"""The rows of a plate that a call is about."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["Subsample", "check_positions", "has_values"]

_WHOLE = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Subsample:
    """The rows of one plate in one call of the model.

    Attributes:
        size: the number ``N`` of rows of the plate.
        index: ``[B]`` the rows of this call, ``None`` for all of them in order.
    """

    size: int
    index: Tensor | None

    def __len__(self) -> int:
        return self.size if self.index is None else len(self.index)


def check_positions(plate: str, size: int, index: Tensor | None, *, wait: bool = False) -> None:
    """Raise an error if positions are not those of rows of a plate.

    On another device than the CPU their values are looked at only where the caller can wait for them, and while a graph is
    traced they have none.

    Args:
        plate: the name of the plate.
        size: the number ``N`` of its rows.
        index: ``[B]`` the positions given; ``None`` for all rows in order.
        wait: whether the caller can wait for the device.

    Raises:
        ValueError: if they are no whole numbers from 0 to ``N - 1``.
    """
    if index is None:
        return
    if index.dtype not in _WHOLE or index.dim() != 1:
        found = f"values of type {index.dtype} and shape {tuple(index.shape)}"
    elif not len(index) or not (wait or index.device.type == "cpu") or not has_values(index):
        return
    else:
        low, high = (int(x) for x in index.aminmax())
        if low >= 0 and high < size:
            return
        found = f"whole numbers from {low} to {high}"
    raise ValueError(
        f"Expected the rows of plate {plate!r} as positions [B], whole numbers from 0 to {size - 1}, got {found}.\n"
        f"subsample= takes positions, not data: pyro.plate({plate!r}, {size}, subsample=index)."
    )


def has_values(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be inspected.

    A tensor has no values while a graph is traced or inside ``vmap``. While a run is recorded, reading them would be taken for
    an operation of the model.
    """
    return (
        type(tensor) is Tensor
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())
    )
