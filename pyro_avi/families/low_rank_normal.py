"""Normals whose covariance is diagonal plus low rank."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.errors import check_count
from pyro_avi.families.family import Family, Setting

__all__ = ["LowRankNormal"]


class LowRankNormal(Family):
    r"""Normals whose covariance is a diagonal and a matrix of low rank ``R``.

    .. math:: q(z_n) = N(z_n; m_n, W_n W_n^\top + \mathrm{diag}(d_n^2)), \qquad W_n = \mathrm{diag}(d_n) V_n,
              \qquad \lambda_n = (m_n, \log d_n, V_n)

    with :math:`V_n` of shape ``[K, R]``, row by row, so ``P = K (2 + R)``: between :class:`~pyro_avi.DiagonalNormal` and
    :class:`~pyro_avi.MultivariateNormal`, and evaluated without a ``K`` by ``K`` matrix. :math:`V_n`, unlike
    :math:`W_n`, has no unit: steps of one size suit latents of every scale.

    Args:
        rank: ``R``.

    Raises:
        TypeError, ValueError: if ``rank`` is not a whole number of at least 1; in :meth:`distribution`, if the number of
            parameters is no multiple of ``2 + R``.

    References:
        Ong, Nott and Smith, "Gaussian variational approximation with a factor covariance structure", 2018,
        https://arxiv.org/abs/1701.03208.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.LowRankNormal(rank=2)
        >>> parameters = family.initial(torch.zeros(5, 10), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 40])
        >>> bool(torch.allclose(family.distribution(parameters).stddev, torch.tensor(0.1)))
        True
    """

    symmetric = True

    def __init__(self, rank: int):
        super().__init__()
        self.rank = check_count("rank", rank)

    def num_parameters(self, num_latents: int) -> int:
        """``K (2 + R)``: locations, log scales and the factor."""
        return num_latents * (2 + self.rank)

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` at ``loc [..., K]`` with every marginal standard deviation ``scale``.

        The latents are weakly correlated, for without that the factor would never learn: a column of zeros has no
        gradient, and two equal columns stay equal.
        """
        row = torch.arange(1, loc.shape[-1] + 1, dtype=loc.dtype, device=loc.device)
        column = torch.arange(1, self.rank + 1, dtype=loc.dtype, device=loc.device)
        # The sine of a whole number is not zero and does not repeat; no random numbers, so that a setup can be repeated.
        factor = (row.unsqueeze(-1) * column).sin() / (2 * self.rank**0.5)
        log_scale = (scale / (1 + factor.square().sum(-1)).sqrt()).log().expand_as(loc)
        return torch.cat([loc, log_scale, factor.flatten().expand(*loc.shape[:-1], factor.numel())], -1)

    def distribution(self, parameters: Tensor) -> dist.LowRankMultivariateNormal:
        """The normal with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        # Under torch.jit.trace the elements of a shape are tensors.
        count, rest = divmod(int(parameters.shape[-1]), 2 + self.rank)
        if rest or not count:
            raise ValueError(
                f"Expected K (2 + rank) = {2 + self.rank} K parameters a row for a whole number K of latents, got "
                f"{parameters.shape[-1]}."
            )
        loc, log_scale, factor = parameters.split([count, count, count * self.rank], -1)
        scale = log_scale.exp()
        factor = scale.unsqueeze(-1) * factor.unflatten(-1, (count, self.rank))
        return dist.LowRankMultivariateNormal(loc, factor, scale.square())

    def marginals(self, parameters: Tensor) -> dist.Normal:
        """The normal of each coordinate by itself: batch shape ``[..., K]``."""
        normal = self.distribution(parameters)
        return dist.Normal(normal.loc, normal.stddev)

    def settings(self) -> Mapping[str, Setting]:
        """The rank."""
        return {"rank": self.rank}
