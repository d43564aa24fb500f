"""Estimates: reductions of log weights."""

from pyro_avi.estimators.elbo import elbo
from pyro_avi.estimators.estimate import Estimate
from pyro_avi.estimators.iwelbo import ess, iwelbo
from pyro_avi.estimators.psis import TailIndex, khat

__all__ = ["Estimate", "TailIndex", "elbo", "ess", "iwelbo", "khat"]
