"""The multilayer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP"]


class MLP(nn.Module):
    r"""Flattens each row and applies linear layers, each followed by a nonlinearity.

    .. math:: h_0 = \mathrm{vec}(x), \qquad h_i = a(W_i h_{i-1} + b_i)

    Args:
        in_features: the number of elements of a row.
        widths: the number of units of each layer; the last one is ``H``.
        activation: makes a module for the nonlinearity :math:`a`.

    Raises:
        ValueError: if ``in_features`` or a width is not a positive whole number, or there is no width.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import MLP
        >>> encoder, x = MLP(64, (32, 16)), torch.rand(5, 1, 8, 8)
        >>> encoder(x).shape
        torch.Size([5, 16])
    """

    def __init__(self, in_features: int, widths: Sequence[int], *, activation: Callable[[], nn.Module] = nn.SiLU):
        super().__init__()
        sizes = self.check_widths((in_features, *self.check_widths(widths)))
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        self.layers = nn.Sequential(*layers)

    @property
    def widths(self) -> list[int]:
        """The number of units of each layer."""
        return [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)]

    @staticmethod
    def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
        """The widths as a tuple, if they are positive whole numbers."""
        if isinstance(widths, str) or not isinstance(widths, Sequence):
            raise TypeError(
                f"Expected an encoder as a module or as the widths of an MLP, e.g. (64, 64), got {widths!r}."
            )
        if not widths:
            raise ValueError("Expected at least one width, got none.")
        for width in widths:
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ValueError(
                    f"Expected widths that are whole numbers of at least 1, got {width!r} in {tuple(widths)}."
                )
        return tuple(widths)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, H]`` of rows ``x [B, ...]``."""
        return self.layers(x.reshape(len(x), -1))
