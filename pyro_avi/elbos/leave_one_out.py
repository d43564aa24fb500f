"""The ELBO of several draws, the score of each against the mean of the others."""

from torch import Tensor

from pyro_avi.elbos.several_draws import Draws, SeveralDrawsELBO

__all__ = ["LeaveOneOutELBO"]


class LeaveOneOutELBO(SeveralDrawsELBO):
    r"""The ELBO by K draws, with the other draws' mean as the baseline of each (RLOO).

    .. math:: \nabla \mathrm{ELBO} = E \left[ \frac 1K \sum_k \Big( \log w_k - \frac{1}{K - 1} \sum_{j \ne k} \log w_j \Big)
              \nabla \log q(z_k) + \nabla \log p(x, z_k) \right]

    for latents without a path; those with one are differentiated through. It needs no baseline that is learned, and the
    baseline of a row is that row's own.

    Args:
        num_particles: ``K``, at least 2.
        continuous: whether latents with a path are given the score function as well.
        vectorize_particles, max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if there is one draw, which leaves none to compare it with.

    References:
        Kool, van Hoof and Welling, "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019,
        https://openreview.net/forum?id=r1lgTGL5DE.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = (torch.rand(20, 1, 8, 8) > 0.5).float()
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> elbo = avi.LeaveOneOutELBO(num_particles=4, vectorize_particles=True)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=elbo, progress=False).steps
        2
    """

    least_particles = 2

    def bound(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The ELBO of every row ``[*B]``, and what is differentiated in its place."""
        weights, count = draws.log_weights, len(draws.log_weights)
        value = weights.mean(0)
        if not draws.has_scores:
            return value, value
        fixed = weights.detach()
        signal = fixed - (fixed.sum(0) - fixed) / (count - 1)
        # The mean of a score is zero: those in the weights would only add noise.
        without_scores = weights + (draws.log_q - draws.log_q.detach())
        return value, (without_scores + draws.log_q * signal).mean(0)
