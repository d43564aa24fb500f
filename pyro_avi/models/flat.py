"""The flat prior."""

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Flat"]


class Flat(dist.TorchDistribution):
    """Density 1 everywhere on the real line: no distribution, but a prior where the posterior has a finite integral.

    ``dist.ImproperUniform`` cannot be sampled, and so a model with it neither simulated nor traced by an autoguide. Here a
    "draw" is a given value.

    Args:
        at: what a draw returns.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real

    def __init__(self, at: Tensor):
        self.at = at
        super().__init__(at.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None) -> "Flat":
        """The same with a larger batch shape."""
        return Flat(self.at.expand(batch_shape))

    def sample(self, sample_shape=()) -> Tensor:
        """The given value."""
        return self.at.expand(self._extended_shape(torch.Size(sample_shape))).clone()

    def log_prob(self, value: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(value)
