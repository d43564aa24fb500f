"""The three guides. They differ in their inference function and in nothing else."""

from pyro_avi.guides.amortized import AmortizedGuide
from pyro_avi.guides.constant import ConstantGuide
from pyro_avi.guides.factorized import FactorizedGuide
from pyro_avi.guides.mean_field import MeanFieldNormal

__all__ = ["AmortizedGuide", "ConstantGuide", "FactorizedGuide", "MeanFieldNormal"]
