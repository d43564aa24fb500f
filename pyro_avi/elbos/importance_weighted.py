"""The importance-weighted bound of K draws, by the path and the plain score function."""

import math

from torch import Tensor

from pyro_avi.elbos.several_draws import Draws, SeveralDrawsELBO

__all__ = ["ImportanceWeightedELBO"]


class ImportanceWeightedELBO(SeveralDrawsELBO):
    r"""The bound of the importance-weighted autoencoder, row by row, with its total derivative.

    .. math:: \mathcal{L}_K = \sum_n E \left[ \log \frac 1K \sum_{k=1}^K \frac{p(x_n, z_{nk})}{q(z_{nk})} \right]
              \le \log p(x)

    Latents without a path are given the plain score function: :class:`~pyro_avi.VimcoELBO` has less noise. The gradient in
    the guide's parameters loses its signal as K grows, which :class:`~pyro_avi.DoublyReparameterizedELBO` does not.

    ``pyro.infer.RenyiELBO`` weights the draws of all rows together, a looser bound.

    Args:
        num_particles: ``K``.
        continuous: whether latents with a path are given the score function as well.
        vectorize_particles, max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    References:
        Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> elbo = avi.ImportanceWeightedELBO(num_particles=5, vectorize_particles=True)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=elbo, progress=False).steps
        2
    """

    def bound(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The bound of every row ``[*B]``, and what is differentiated in its place."""
        value = draws.log_weights.logsumexp(0) - math.log(len(draws.log_weights))
        if not draws.has_scores:
            return value, value
        return value, value + (draws.log_q * self._signal(draws, value)).sum(0)

    def _signal(self, draws: Draws, value: Tensor) -> Tensor:
        """What the score of every draw is multiplied by, ``[K, *B]`` or ``[*B]``."""
        return value.detach()
