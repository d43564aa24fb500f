"""Discrete latents, with the gradient of relaxed ones."""

from pyro_avi.elbos.relaxed import RelaxedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["StraightThrough"]


class StraightThrough(GradientEstimator):
    """The path of :class:`~pyro_avi.RelaxedELBO` straight through discrete values; biased."""

    is_biased = True

    def create(self, pair):
        """The ELBO."""
        pair.require_relaxable("straight_through")
        return RelaxedELBO(pair.temperature, straight_through=True)
