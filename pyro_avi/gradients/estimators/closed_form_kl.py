"""The path, with the divergence from the prior in closed form."""

from pyro.infer import TraceMeanField_ELBO

from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["ClosedFormKl"]


class ClosedFormKl(GradientEstimator):
    """The path derivative of ``pyro.infer.TraceMeanField_ELBO``: only the likelihood is estimated by draws."""

    def create(self, pair):
        """The ELBO."""
        pair.require_paths("closed_form_kl")
        return TraceMeanField_ELBO()
