"""The importance-weighted bound by the score function, each draw against the others."""

from pyro_avi.elbos.vimco import VimcoELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["Vimco"]


class Vimco(GradientEstimator):
    """The score function of :class:`~pyro_avi.VimcoELBO`, also where there is a path."""

    bound = "importance-weighted"

    def create(self, pair):
        """The ELBO."""
        options = {"vectorize_particles": True, "max_plate_nesting": pair.max_plate_nesting}
        return VimcoELBO(pair.num_particles, continuous=True, **options)
