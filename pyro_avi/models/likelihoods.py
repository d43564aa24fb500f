"""How an observation follows from what a decoder returns."""

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

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

    def forward(self, output: Tensor) -> dist.Normal:
        """The distribution of every element, shape as ``output``."""
        return dist.Normal(output, self.scale)


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
