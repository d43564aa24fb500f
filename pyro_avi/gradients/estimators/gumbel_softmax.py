"""Discrete latents relaxed to continuous ones."""

from pyro_avi.elbos.relaxed import RelaxedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["GumbelSoftmax"]


class GumbelSoftmax(GradientEstimator):
    """The path of :class:`~pyro_avi.RelaxedELBO`; biased."""

    is_biased = True

    def create(self, pair):
        """The ELBO."""
        pair.require_relaxable("gumbel_softmax")
        return RelaxedELBO(pair.temperature)
