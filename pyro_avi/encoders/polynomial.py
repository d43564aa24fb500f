"""The polynomial encoder."""

from itertools import combinations_with_replacement
from math import comb

import torch
from torch import Tensor, nn

from pyro_avi.encoders.mlp import MLP

__all__ = ["Polynomial"]

# More features than these are no longer a small least-squares problem.
_MOST = 10_000


class Polynomial(nn.Module):
    r"""All products of at most ``degree`` elements of a row; it has no parameters, and the guide's head is linear in them.

    .. math:: h(x) = \Big( x_i, \; x_i x_j, \; \dots \Big)_{i \le j \le \dots}

    With degree 1 the variational parameters are linear in the row. With degree 0 there is no product, and one feature that
    is 0: the guide is then a constant one.

    Args:
        in_features: the number of elements of a row.
        degree: of the polynomial.

    Raises:
        ValueError: if ``in_features`` is no positive whole number, ``degree`` is negative, or the products are too many.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import Polynomial
        >>> encoder, x = Polynomial(2, 2), torch.rand(5, 2)
        >>> encoder(x).shape
        torch.Size([5, 5])
    """

    def __init__(self, in_features: int, degree: int):
        super().__init__()
        MLP.check_widths((in_features,))
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
            raise ValueError(f"Expected degree to be a whole number of at least 0, got {degree!r}.")
        self.in_features, self.degree = in_features, degree
        for order in range(1, degree + 1):
            count = comb(in_features + order - 1, order)
            if count > _MOST:
                raise ValueError(
                    f"Expected at most {_MOST:,} products of one degree, got {count:,} of {in_features} elements."
                )
            # Position in_features stands for 1, so that all products have as many factors as the highest.
            ones = [in_features] * (degree - order)
            factors = [(*each, *ones) for each in combinations_with_replacement(range(in_features), order)]
            self.register_buffer(f"_factors_{order}", torch.tensor(factors), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, H]`` of rows ``x [B, ...]``."""
        x = x.reshape(len(x), -1)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"Expected rows with {self.in_features} elements, got {x.shape[-1]}.")
        if not self.degree:
            return torch.zeros_like(x[:, :1])
        x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        positions = torch.cat([getattr(self, f"_factors_{order}") for order in range(1, self.degree + 1)])
        return x[:, positions].prod(-1)
