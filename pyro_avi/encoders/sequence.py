"""What encoders share that read a whole series of rows."""

from abc import abstractmethod

import torch
from torch import Tensor

from pyro_avi.encoders.gaps import ReadsGaps, with_flags
from pyro_avi.encoders.mlp import MLP

__all__ = ["SequenceEncoder", "lengths_of"]


class SequenceEncoder(ReadsGaps):
    """An encoder over a plate: the features of a row depend on all rows of its series.

    It maps ``[*series, N, F]`` to ``[*series, N, H]``. A guide gives it all rows of the last of the plates of its row set,
    whatever rows a batch holds, and the other plates as independent series. Series of different lengths end in rows that
    are ``nan``, and the features of the other rows do not depend on how many. Subclasses are final and give ``_encode``.

    Args:
        in_features: the number of values of a row.
    """

    def __init__(self, in_features: int):
        super().__init__()
        self.in_features, *_ = MLP.check_widths((in_features,))

    @abstractmethod
    def _encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Features ``[S, N, H]`` of values beside their flags ``[S, N, 2 F]``, of which each series has some rows ``[S]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[*series, N, H]`` of series ``x [*series, N, F]``."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"Expected series of rows, [..., N, {self.in_features}], got shape {tuple(x.shape)}.")
        series = x.reshape(-1, *x.shape[-2:])
        features = self._encode(with_flags(series), lengths_of(series))
        return features.reshape(*x.shape[:-1], features.shape[-1])


def lengths_of(series: Tensor) -> Tensor:
    """``[S]`` the number of rows up to the last one with a value that is known.

    Args:
        series: ``[S, N, F]`` with ``nan`` for what is not.
    """
    known = (~series.isnan()).any(-1)
    return (known * torch.arange(1, known.shape[1] + 1, device=series.device)).amax(1)
