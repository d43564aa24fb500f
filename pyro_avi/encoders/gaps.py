"""Encoders of rows with gaps: elements and values that are not there."""

import torch
from torch import Tensor, nn

__all__ = ["ReadsGaps", "with_flags"]


class ReadsGaps(nn.Module):
    """An encoder that reads ``nan`` where a value is not known, and never lets it through.

    A guide gives it masked values, and neighbours beyond the ends of a series, in this form. Subclasses are final.
    """


def with_flags(x: Tensor) -> Tensor:
    """The values with zeros in place of ``nan``, and beside them 1 where they are known: ``[..., F]`` to ``[..., 2 F]``.

    Args:
        x: ``[..., F]``.
    """
    known = ~x.isnan()
    return torch.cat([torch.where(known, x, 0.0), known.to(x.dtype)], -1)
