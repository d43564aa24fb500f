"""The score function against a network that predicts the cost of a row."""

from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["LearnedBaseline"]


class LearnedBaseline(GradientEstimator):
    """The score function against a learned baseline, after 300 steps of its network with everything else at rest."""

    warm_up = 300

    def create(self, pair):
        """The ELBO."""
        return RaoBlackwellizedELBO("learned", continuous=True)
