"""The path of every draw: the reparameterization trick."""

from pyro.infer import Trace_ELBO

from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["Pathwise"]


class Pathwise(GradientEstimator):
    """The total derivative of ``pyro.infer.Trace_ELBO`` by the path of every draw."""

    def create(self, pair):
        """The ELBO."""
        pair.require_paths("pathwise")
        return Trace_ELBO()
