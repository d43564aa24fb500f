"""An encoder of a newcomer's: waves of random frequency, then one layer."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Waves"]


class Waves(nn.Module):
    """Cosines of random projections of a row, and a linear layer of them.

    Args:
        in_features: the number of elements of a row.
        waves: the number of projections.
        features: ``H``.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders.waves import Waves
        >>> encoder, x = Waves(64, 10, 16), torch.rand(5, 1, 8, 8)
        >>> encoder(x).shape
        torch.Size([5, 16])
    """

    def __init__(self, in_features: int, waves: int, features: int):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(waves, in_features) / in_features**0.5)
        self.register_buffer("phases", torch.linspace(0, 2 * math.pi, waves))
        self.layer = nn.Linear(waves, features)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, H]`` of rows ``x [B, ...]``."""
        return self.layer((x.reshape(len(x), -1) @ self.frequencies.t() + self.phases).cos())
