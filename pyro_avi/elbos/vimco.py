"""The importance-weighted bound for latents without a path: each draw's score against what the others leave to expect."""

import math

import torch
from torch import Tensor

from pyro_avi.elbos.importance_weighted import ImportanceWeightedELBO
from pyro_avi.elbos.several_draws import Draws

__all__ = ["VimcoELBO"]


class VimcoELBO(ImportanceWeightedELBO):
    r"""The importance-weighted bound with the leave-one-out baseline of VIMCO.

    .. math:: \nabla \mathcal{L}_K = E \left[ \sum_k \left( \hat L - \hat L_{-k} \right) \nabla \log q(z_k)
              + \sum_k \tilde w_k \nabla \log w_k \right], \qquad
              \hat L_{-k} = \log \frac 1K \Big( \sum_{j \ne k} w_j + \big( \prod_{j \ne k} w_j \big)^{1 / (K - 1)} \Big)

    for latents without a path; those with one are differentiated through. It needs no baseline that is learned.

    Args:
        num_particles: ``K``, at least 2.
        continuous: whether latents with a path are given the score function as well.
        vectorize_particles, max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if there is one draw, which leaves none to compare it with.

    References:
        Mnih and Rezende, "Variational inference for Monte Carlo objectives", 2016, https://arxiv.org/abs/1602.06725.

    Example::

        >>> import pyro_avi as avi
        >>> avi.VimcoELBO(num_particles=1)
        Traceback (most recent call last):
        ValueError: Expected num_particles of at least 2, got 1.
    """

    least_particles = 2

    def _signal(self, draws: Draws, value: Tensor) -> Tensor:
        weights = draws.log_weights.detach()
        count = len(weights)
        others = (weights.sum(0) - weights) / (count - 1)
        # Of every draw in turn, its weight replaced by the geometric mean of the others'.
        replaced = torch.where(
            torch.eye(count, dtype=torch.bool, device=weights.device).view(count, count, *[1] * (weights.dim() - 1)),
            others.unsqueeze(0),
            weights.unsqueeze(0),
        )
        return value.detach() - (replaced.logsumexp(1) - math.log(count))
