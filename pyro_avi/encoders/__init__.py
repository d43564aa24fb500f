"""Encoders: plain modules from ``[B, *input]`` to features ``[B, H]``, for any amortized guide."""

from pyro_avi.encoders.attention import Attention
from pyro_avi.encoders.conv import Conv
from pyro_avi.encoders.mlp import MLP
from pyro_avi.encoders.noise import Noise
from pyro_avi.encoders.polynomial import Polynomial
from pyro_avi.encoders.recurrent import Recurrent
from pyro_avi.encoders.set import Set

__all__ = ["MLP", "Attention", "Conv", "Noise", "Polynomial", "Recurrent", "Set"]
