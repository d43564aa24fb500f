"""The score function of K draws, each against the mean of the others."""

from pyro_avi.elbos.leave_one_out import LeaveOneOutELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["LeaveOneOut"]


class LeaveOneOut(GradientEstimator):
    """The score function of :class:`~pyro_avi.LeaveOneOutELBO` (RLOO), also where there is a path."""

    def create(self, pair):
        """The ELBO."""
        options = {"vectorize_particles": True, "max_plate_nesting": pair.max_plate_nesting}
        return LeaveOneOutELBO(pair.num_particles, continuous=True, **options)
