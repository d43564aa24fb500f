"""The family of all normals."""

import math
from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.families.family import Family, Setting, log_scales

__all__ = ["MultivariateNormal"]


class MultivariateNormal(Family):
    r"""Normals with any covariance.

    .. math:: q(z_n) = N(z_n; m_n, C_n C_n^\top), \qquad C_n = \mathrm{diag}(s_n) (I + L_n),
              \qquad \lambda_n = (m_n, \log s_n, L_n)

    with :math:`L_n` strictly lower triangular, row by row, so ``P = K + K (K + 1) / 2``. The product, rather than
    :math:`\mathrm{diag}(s_n) + L_n`, leaves the entries of :math:`L_n` without a unit: steps of one size suit latents
    of every scale. Each normal is a member, once.

    Raises:
        ValueError: in :meth:`distribution`, if the number of parameters is none of 2, 5, 9, 14, ...

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.MultivariateNormal()
        >>> parameters = family.initial(torch.zeros(5, 3), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 9])
        >>> family.distribution(parameters).covariance_matrix.shape
        torch.Size([5, 3, 3])
    """

    symmetric = True

    def num_parameters(self, num_latents: int) -> int:
        """``K + K (K + 1) / 2``: locations, log scales and the strict triangle of the factor."""
        return num_latents * (num_latents + 3) // 2

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., P]`` of independent normals at ``loc [..., K]`` with standard deviation ``scale``."""
        count = loc.shape[-1]
        lower = loc.new_zeros((*loc.shape[:-1], count * (count - 1) // 2))
        return torch.cat([loc, log_scales(loc, scale), lower], -1)

    def distribution(self, parameters: Tensor) -> dist.MultivariateNormal:
        """The normal with ``parameters [..., P]``: batch shape ``[...]``, event shape ``[K]``."""
        count = (math.isqrt(8 * parameters.shape[-1] + 9) - 3) // 2
        if count < 1 or self.num_parameters(count) != parameters.shape[-1]:
            raise ValueError(
                f"Expected K (K + 3) / 2 parameters a row for a whole number K of latents, got {parameters.shape[-1]}."
            )
        loc, log_scale, lower = parameters.split([count, count, count * (count - 1) // 2], -1)
        row, column = torch.tril_indices(count, count, -1, device=parameters.device)
        factor = parameters.new_zeros((*parameters.shape[:-1], count * count))
        factor = factor.index_copy(-1, row * count + column, lower).unflatten(-1, (count, count))
        factor = factor + torch.eye(count, dtype=parameters.dtype, device=parameters.device)
        return dist.MultivariateNormal(loc, scale_tril=log_scale.exp().unsqueeze(-1) * factor)

    def marginals(self, parameters: Tensor) -> dist.Normal:
        """The normal of each coordinate by itself: batch shape ``[..., K]``."""
        normal = self.distribution(parameters)
        return dist.Normal(normal.loc, normal.stddev)

    def fisher(self, parameters: Tensor) -> Tensor:
        r"""The diagonal of the Fisher information, with the precision :math:`Q = \Sigma^{-1}`.

        :math:`Q_{ii}` for a location, :math:`1 + Q_{ii} \Sigma_{ii}` for the logarithm of a scale, :math:`s_i^2 Q_{ii}` for an
        element of row :math:`i` below the diagonal.
        """
        normal = self.distribution(parameters)
        count = normal.event_shape[0]
        precision = torch.cholesky_inverse(normal.scale_tril).diagonal(dim1=-2, dim2=-1)
        log_scale = parameters[..., count : 2 * count]
        row = torch.tril_indices(count, count, -1, device=parameters.device)[0]
        lower = (torch.exp(2 * log_scale) * precision)[..., row]
        return torch.cat([precision, 1 + precision * normal.variance, lower], -1)

    def settings(self) -> Mapping[str, Setting]:
        """Nothing to set: ``{}``."""
        return {}
