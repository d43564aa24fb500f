"""Estimates: reductions of log weights."""

from pyro_avi.estimators.elbo import elbo
from pyro_avi.estimators.estimate import Estimate

__all__ = ["Estimate", "elbo"]
