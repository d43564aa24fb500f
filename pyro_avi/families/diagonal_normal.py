"""The mean-field family."""

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.families.family import Family, Setting, log_scales

__all__ = ["DiagonalNormal"]


class DiagonalNormal(Family):
    r"""Independent normals, the mean-field family and the default.

    .. math:: q(z_n) = \prod_{k=1}^{K} N(z_{nk}; m_{nk}, s_{nk}^2),
              \qquad \lambda_n = (m_{n1}, \dots, m_{nK}, \log s_{n1}, \dots, \log s_{nK})

    so ``P = 2 K``. Because the coordinates are independent, guides sample every site directly from its own normal, and
    closed-form Kullback-Leibler divergences apply.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> family = avi.DiagonalNormal()
        >>> parameters = family.initial(torch.zeros(5, 3), scale=0.1)
        >>> parameters.shape
        torch.Size([5, 6])
        >>> q = family.distribution(parameters)
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    symmetric = True
    independent = True

    def num_parameters(self, num_latents: int) -> int:
        """``2 K``: a location and a log standard deviation for each latent."""
        return 2 * num_latents

    def initial(self, loc: Tensor, scale: float | Tensor) -> Tensor:
        """Parameters ``[..., 2 K]`` with locations ``loc [..., K]`` and every standard deviation ``scale``."""
        return torch.cat([loc, log_scales(loc, scale)], -1)

    def coordinates(self, parameters: Tensor) -> dist.Normal:
        """The ``K`` independent normals with ``parameters [..., 2 K]``: batch shape ``[..., K]``, no event."""
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp())

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        """The product of the coordinates: batch shape ``[...]``, event shape ``[K]``."""
        return self.coordinates(parameters).to_event(1)

    def marginals(self, parameters: Tensor) -> dist.Normal:
        """The coordinates themselves."""
        return self.coordinates(parameters)

    def fisher(self, parameters: Tensor) -> Tensor:
        """``1 / s^2`` for a location and 2 for the logarithm of a standard deviation."""
        log_scale = parameters.chunk(2, -1)[1]
        return torch.cat([torch.exp(-2 * log_scale), torch.full_like(log_scale, 2.0)], -1)

    def settings(self) -> Mapping[str, Setting]:
        """Nothing to set: ``{}``."""
        return {}
