"""A deep generative model with a prior on the decoder's weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

import pyro
import pyro.distributions as dist
from torch import Tensor, nn
from torch.func import functional_call

from pyro_avi.models.latent_decoder import LatentDecoder

__all__ = ["BayesianDecoder"]


class BayesianDecoder(LatentDecoder):
    r"""The Bayesian deep generative model: all weights and biases of the decoder are global latents.

    .. math:: \theta \sim N(0, I), \qquad z_n \sim N(0, I_K), \qquad x_n \sim p(x_n \mid \mathrm{decoder}(z_n; \theta))

    The site ``"theta"`` holds all weights and biases, in the order of the module's parameters. The module gives their shapes
    alone: its own weights are never used.

    Args:
        decoder: a module with an attribute ``latent_dim`` (``K``), from ``[B, K]`` to ``[B, *shape]``.
        size, likelihood: as for :class:`~pyro_avi.models.VAE`.

    Raises:
        ValueError: if the decoder has buffers, such as running means.

    References:
        Margossian and Blei, "Amortized Variational Inference: When and Why?", 2024, https://arxiv.org/abs/2307.11018.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=100)
        >>> guide = avi.AmortizedGuide(model).setup(torch.rand(100, 1, 8, 8))
        >>> sum(parameter.numel() for parameter in guide.global_guide.parameters())
        2272
    """

    def __init__(self, decoder: nn.Module, *, size: int, likelihood: nn.Module | None = None):
        super().__init__(cast(int, decoder.latent_dim), size=size, likelihood=likelihood)
        if any(True for _ in decoder.buffers()):
            raise ValueError(
                f"Expected a decoder whose state is its weights alone, got one with buffers: {type(decoder).__name__}."
            )
        # A copy on the meta device has the weights' shapes, neither memory nor values; in a tuple, it is no submodule.
        self._network = (copy.deepcopy(decoder).to("meta"),)

        self._shapes = {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}
        self._sizes = [weight.numel() for weight in decoder.parameters()]

    def _decode(self) -> Callable[[Tensor], Tensor]:
        (network,) = self._network
        # One site for all weights: Pyro's cost is by site, and there is one prior.
        theta = pyro.sample("theta", dist.Normal(self.zero.expand(sum(self._sizes)), 1.0).to_event(1))
        parts = theta.split(self._sizes)
        weights = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}
        return partial(functional_call, network, weights)
