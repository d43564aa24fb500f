"""Families: the sets that a row's factor is taken from, one a file."""

from pyro_avi.families.conditional import Conditional
from pyro_avi.families.diagonal_normal import DiagonalNormal
from pyro_avi.families.family import Family
from pyro_avi.families.flow import Flow
from pyro_avi.families.low_rank_normal import LowRankNormal
from pyro_avi.families.markov_normal import MarkovNormal
from pyro_avi.families.multivariate_normal import MultivariateNormal
from pyro_avi.families.row_flow import RowFlow

__all__ = [
    "Conditional",
    "DiagonalNormal",
    "Family",
    "Flow",
    "LowRankNormal",
    "MarkovNormal",
    "MultivariateNormal",
    "RowFlow",
]
