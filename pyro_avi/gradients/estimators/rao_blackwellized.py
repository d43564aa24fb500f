"""The score function, of each latent against the terms that depend on it alone."""

from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["RaoBlackwellized"]


class RaoBlackwellized(GradientEstimator):
    """The score function of ``pyro.infer.TraceGraph_ELBO``, with the baselines that the guide asks for, if any."""

    warm_up = 50

    def create(self, pair):
        """The ELBO."""
        return RaoBlackwellizedELBO(continuous=True)
