"""Discrete latents summed over."""

from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_avi.elbos.enumerated import EnumeratedELBO
from pyro_avi.gradients.estimator import GradientEstimator

__all__ = ["Enumeration"]


class Enumeration(GradientEstimator):
    """The exact sum over discrete latents.

    By ``pyro.infer.TraceEnum_ELBO`` where it can list the values of every element; vectors are summed over their joint values,
    by :class:`~pyro_avi.EnumeratedELBO`.
    """

    def __init__(self):
        self._one_by_one = False

    def create(self, pair):
        """The ELBO."""
        pair.require_discrete("enumeration")
        self._one_by_one = pair.one_by_one
        kind = TraceEnum_ELBO if pair.one_by_one else EnumeratedELBO
        return kind(max_plate_nesting=pair.max_plate_nesting)

    def guide(self, guide):
        """The guide, its sites marked for enumeration where Pyro lists their values."""
        return config_enumerate(guide, "parallel") if self._one_by_one else guide
