"""A family of a newcomer's: independent Laplace variables."""

import math

import pyro.distributions as dist
import torch

from pyro_avi.families.family import Family, log_scales

__all__ = ["Laplace"]


class Laplace(Family):
    r"""Independent Laplace variables: locations and log scales, ``P = 2 K``.

    .. math:: q(z; \mu, \log b) = \prod_k \frac{1}{2 b_k} e^{-|z_k - \mu_k| / b_k}
    """

    symmetric = True

    def num_parameters(self, num_latents):
        """``2 K``."""
        return 2 * num_latents

    def initial(self, loc, scale):
        """Parameters ``[..., 2 K]``; the standard deviation of a Laplace variable is ``2 ** 0.5`` of its scales."""
        return torch.cat([loc, log_scales(loc, scale) - math.log(2) / 2], -1)

    def distribution(self, parameters):
        """The product of Laplace variables: batch shape ``[...]``, event shape ``[K]``."""
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)

    def settings(self):
        """Nothing to set."""
        return {}
