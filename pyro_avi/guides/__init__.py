"""The guides, one a file. They differ in their inference function and in nothing else."""

from pyro_avi.guides.amortized import AmortizedGuide
from pyro_avi.guides.constant import ConstantGuide
from pyro_avi.guides.factorized import FactorizedGuide
from pyro_avi.guides.semi_amortized import SemiAmortizedGuide

__all__ = ["AmortizedGuide", "ConstantGuide", "FactorizedGuide", "SemiAmortizedGuide"]
