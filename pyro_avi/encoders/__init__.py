"""Encoders: plain modules from ``[B, *input]`` to features ``[B, H]``, for any amortized guide."""

from pyro_avi.encoders.conv import Conv
from pyro_avi.encoders.mlp import MLP

__all__ = ["MLP", "Conv"]
