"""The score function: REINFORCE, the policy gradient."""

from pyro_avi.elbos.score_function import ScoreFunctionELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["ScoreFunction"]


class ScoreFunction(GradientEstimator):
    """The score function for every latent, also where there is a path, by ``pyro.infer.Trace_ELBO``."""

    def create(self, pair):
        """The ELBO."""
        return ScoreFunctionELBO()
