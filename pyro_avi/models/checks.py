"""Checks that the problems with exact answers share."""

import torch
from torch import Tensor

__all__ = ["as_scales", "check_positive", "check_rows"]


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse a scale that is not a positive number."""
    value = torch.as_tensor(value)
    if not (value > 0).all() or not value.isfinite().all():
        raise ValueError(f"Expected {name} to be positive and finite, got {value.tolist()}.")


def as_scales(name: str, scale: float | Tensor, size: int, like: Tensor) -> Tensor:
    """``[size]`` standard deviations from one number or as many, with the type and device of another tensor."""
    check_positive(name, scale)
    # Not by way of the default precision, which would round a number.
    scale = torch.as_tensor(scale, dtype=like.dtype, device=like.device)
    if scale.shape not in ((), (size,)):
        raise ValueError(f"Expected {name} of shape () or ({size},), got {tuple(scale.shape)}.")
    return scale.expand(size)


def check_rows(x: Tensor, event_shape: tuple[int, ...], size: int | None = None) -> Tensor:
    """The rows in double precision, if they have the shape of the model's and are numbers.

    Args:
        x: ``[N, *event_shape]``.
        event_shape: the shape of a row.
        size: the number of rows where all are needed.
    """
    expected = ("N" if size is None else str(size), *map(str, event_shape))
    if x.dim() != len(expected) or x.shape[1:] != event_shape or (size is not None and len(x) != size):
        raise ValueError(f"Expected x of shape [{', '.join(expected)}], got {tuple(x.shape)}.")
    if not len(x):
        raise ValueError("Expected at least one row of x, got none.")
    rows = (~x.isfinite()).flatten(1).any(1) if x.dim() > 1 else ~x.isfinite()
    if rows.any():
        found = rows.nonzero().flatten().tolist()
        raise ValueError(
            f"Expected finite observations, got nan or infinity in {len(found)} of {len(x)} rows, the first is row {found[0]}."
            "\nLeave these rows out: x[x.isfinite().flatten(1).all(1)]."
        )
    return x.double()
