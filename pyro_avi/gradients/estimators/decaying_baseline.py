"""The score function against a decaying average."""

from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["DecayingBaseline"]


class DecayingBaseline(GradientEstimator):
    """The score function against Pyro's average of the costs so far, after 50 evaluations."""

    warm_up = 50

    def create(self, pair):
        """The ELBO."""
        return RaoBlackwellizedELBO("average", continuous=True)
