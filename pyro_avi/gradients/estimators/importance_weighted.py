"""The importance-weighted bound by the path."""

from pyro_avi.elbos.importance_weighted import ImportanceWeightedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["ImportanceWeighted"]


class ImportanceWeighted(GradientEstimator):
    """The total derivative of :class:`~pyro_avi.ImportanceWeightedELBO` by the path of every draw."""

    bound = "importance-weighted"

    def create(self, pair):
        """The ELBO."""
        pair.require_paths("importance_weighted")
        nesting = pair.max_plate_nesting
        return ImportanceWeightedELBO(pair.num_particles, vectorize_particles=True, max_plate_nesting=nesting)
