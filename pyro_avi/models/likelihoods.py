"""How an observation follows from what a decoder returns."""

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["BernoulliLikelihood", "GaussianLikelihood"]


class GaussianLikelihood(nn.Module):
    r"""Normal noise of one scale on every element.

    .. math:: x \sim N(\mathrm{output}, \sigma^2)

    Args:
        scale: the standard deviation :math:`\sigma`, or its initial value where it is learned.
        learned: whether :math:`\sigma` is a parameter of the model.

    Raises:
        ValueError: if the scale is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> likelihood = avi.models.GaussianLikelihood(0.5)
        >>> likelihood(torch.zeros(3)).mean
        tensor([0., 0., 0.])
    """

    def __init__(self, scale: float = 1.0, *, learned: bool = False):
        super().__init__()
        if not scale > 0:
            raise ValueError(f"Expected a positive scale of the noise, got {scale}.")
        log_scale = torch.tensor(math.log(scale))
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The standard deviation of the noise."""
        return self.log_scale.exp()

    def forward(self, output: Tensor) -> "IsotropicNormal":
        """The distribution of every element, shape as ``output``."""
        return IsotropicNormal(output, self.scale)


class IsotropicNormal(dist.TorchDistribution):
    r"""Normals with locations of their own and one scale, evaluated as one.

    .. math:: \log p(x) = -\frac{\lVert x - \mu \rVert^2}{2 \sigma^2} - D \log(\sigma \sqrt{2 \pi})

    ``Normal(loc, scale)`` spreads the scale over all elements and takes as many logarithms and divisions; on images of
    784 pixels that was a fifth of a training step.

    Args:
        loc: the locations, any shape.
        scale: a positive number ``[]``.
        event_dim: the number of trailing dimensions that make up one event.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, event_dim: int = 0):
        self.loc, self.scale, self._event_dim = loc, scale, event_dim
        split = loc.dim() - event_dim
        # Of a tensor whose provenance Pyro tracks, as in TraceGraph_ELBO, parts of the shape are bare tuples.
        batch_shape, event_shape = torch.Size(loc.shape[:split]), torch.Size(loc.shape[split:])
        super().__init__(batch_shape, event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All of the real space."""
        return constraints.independent(constraints.real, self._event_dim)

    @property
    def mean(self) -> Tensor:
        """The locations."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The square of the scale, shape as the locations."""
        return self.scale.square().expand(self.loc.shape)

    def expand(self, batch_shape, _instance=None) -> "IsotropicNormal":
        """The same distribution with a larger batch shape."""
        return IsotropicNormal(self.loc.expand(torch.Size(batch_shape) + self.event_shape), self.scale, self._event_dim)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> "IsotropicNormal":
        """The same elements with more (by default all) dimensions in one event."""
        extra = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return IsotropicNormal(self.loc, self.scale, self._event_dim + extra)

    def rsample(self, sample_shape=()) -> Tensor:
        """Draws, differentiable in locations and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of each event, batch shape."""
        deviation = (value - self.loc).square()
        if self._event_dim:
            deviation = deviation.flatten(-self._event_dim).sum(-1)
        log_normalizer = self.event_shape.numel() * (self.scale.log() + 0.5 * math.log(2 * math.pi))
        return -0.5 * deviation / self.scale.square() - log_normalizer


class BernoulliLikelihood(nn.Module):
    r"""Elements in {0, 1} whose log odds are the decoder's output.

    .. math:: x \sim \mathrm{Bernoulli}(1 / (1 + e^{-\mathrm{output}}))

    Values between 0 and 1 are accepted as in common use on grey images; the bound is then no longer one on a density.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> avi.models.BernoulliLikelihood()(torch.zeros(2)).mean
        tensor([0.5000, 0.5000])
    """

    def forward(self, output: Tensor) -> dist.Bernoulli:
        """The distribution of every element, shape as ``output``."""
        return dist.Bernoulli(logits=output, validate_args=False)
