"""The path alone, without the score."""

from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["StickingTheLanding"]


class StickingTheLanding(GradientEstimator):
    """The path derivative of :class:`~pyro_avi.StickingTheLandingELBO`."""

    def create(self, pair):
        """The ELBO."""
        pair.require_paths("sticking_the_landing")
        return StickingTheLandingELBO()
