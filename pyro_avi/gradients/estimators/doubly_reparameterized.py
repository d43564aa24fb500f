"""The importance-weighted bound by the path alone, reparameterized twice."""

from pyro_avi.elbos.doubly_reparameterized import DoublyReparameterizedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["DoublyReparameterized"]


class DoublyReparameterized(GradientEstimator):
    """The gradient of :class:`~pyro_avi.DoublyReparameterizedELBO` (DReG)."""

    bound = "importance-weighted"

    def create(self, pair):
        """The ELBO."""
        pair.require_paths("doubly_reparameterized")
        nesting = pair.max_plate_nesting
        return DoublyReparameterizedELBO(pair.num_particles, vectorize_particles=True, max_plate_nesting=nesting)
