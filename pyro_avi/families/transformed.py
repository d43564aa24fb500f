"""The distribution of a transformed standard normal, and the transforms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints


@contextmanager
def _same_validation() -> Iterator[None]:
    validated = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validated)


# To import zuko switches off the validation of all distributions of the program.
with _same_validation():
    from zuko.flows import MaskedAutoregressiveTransform
    from zuko.lazy import LazyComposedTransform
    from zuko.transforms import AutoregressiveTransform, ComposedTransform, DependentTransform, MonotonicRQSTransform

__all__ = [
    "AutoregressiveTransform",
    "ComposedTransform",
    "DependentTransform",
    "LazyComposedTransform",
    "MaskedAutoregressiveTransform",
    "MonotonicRQSTransform",
    "Transformed",
]


class Transformed(dist.TorchDistribution):
    """The distribution of ``loc + exp(log_scale) * transform(eps)`` for a standard normal ``eps``.

    It remembers its last draw with its density, which came with the draw, and inverts the transform for others only.
    """

    arg_constraints = {"loc": constraints.real_vector, "log_scale": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True
    _drawn: tuple[Tensor, Tensor, bool] | None = None

    def __init__(self, loc: Tensor, log_scale: Tensor, transform):
        self.loc, self.log_scale, self._transform = loc, log_scale, transform
        super().__init__(loc.shape[:-1], loc.shape[-1:])

    def expand(self, batch_shape, _instance=None):
        """The same distribution with a larger batch shape."""
        new = self._get_checked_instance(Transformed, _instance)
        new.loc, new.log_scale, new._transform = self.loc, self.log_scale, self._transform
        super(Transformed, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()):
        """Draws, differentiable in locations, scales and what the transform is made of."""
        eps = torch.randn(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        bent, log_slope = self._transform.call_and_ladj(eps)
        value = self.loc + self.log_scale.exp() * bent
        self._drawn = value, self._density(eps, log_slope), torch.is_grad_enabled()
        return value

    def log_prob(self, value):
        """The log density ``[...]`` of values ``[..., K]``."""
        if self._drawn is not None and value is self._drawn[0]:
            _, density, with_gradient = self._drawn
            # Drawn without gradient, the value is a number like any other, whose density has a gradient all the same.
            if with_gradient or not torch.is_grad_enabled():
                return density
        if self._validate_args:
            self._validate_sample(value)
        eps, log_slope = self._transform.inv.call_and_ladj((value - self.loc) * (-self.log_scale).exp())
        return self._density(eps, -log_slope)

    def _density(self, eps, log_slope):
        base = -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1)
        return base - log_slope - self.log_scale.sum(-1)
