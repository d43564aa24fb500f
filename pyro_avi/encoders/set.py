"""The encoder of sets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_avi.encoders.gaps import ReadsGaps, with_flags
from pyro_avi.encoders.mlp import MLP

__all__ = ["Set"]


class Set(ReadsGaps):
    r"""Several observations a row, in no order: the mean of their features and their number.

    .. math:: h(x_1, \dots, x_m) = \rho \Big( \frac1m \sum_{i=1}^m \phi(x_i), \; \log(1 + m) \Big)

    with a multilayer perceptron :math:`\phi` and one more layer :math:`\rho`. Permuted observations give the same features.
    Rows may have different numbers of observations: those whose values are all ``nan`` are not there.

    Args:
        in_features: the number of values of an observation.
        widths: the number of units of each layer of :math:`\phi`; the last one is also ``H``.
        activation: makes a module for the nonlinearity after each layer.

    Raises:
        ValueError: if a number is not a positive whole one, or there is no width.

    References:
        Zaheer et al., "Deep Sets", 2017, https://arxiv.org/abs/1703.06114.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import Set
        >>> encoder, x = Set(2, (16, 8)), torch.rand(5, 7, 2)
        >>> encoder(x).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_features: int, widths: Sequence[int], *, activation: Callable[[], nn.Module] = nn.SiLU):
        super().__init__()
        self.in_features, *_ = MLP.check_widths((in_features,))
        self.element = MLP(2 * in_features, widths, activation=activation)
        width = self.element.widths[-1]
        self.pooled = MLP(width + 1, (width,), activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, H]`` of rows ``x [B, M, F]``, or ``[B, M]`` for observations of one value."""
        x = x.unsqueeze(-1) if x.dim() == 2 and self.in_features == 1 else x
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"Expected rows of observations, [B, M, {self.in_features}], got shape {tuple(x.shape)}.")
        if not x.shape[1]:
            raise ValueError(f"Expected room for at least one observation a row, got shape {tuple(x.shape)}.")
        there = (~x.isnan()).any(-1, keepdim=True).to(x.dtype)
        features = self.element(with_flags(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        count = there.sum(1)
        mean = (there * features).sum(1) / count.clamp(min=1.0)
        return self.pooled(torch.cat([mean, count.log1p()], -1))
