"""A variational autoencoder's generative half: the decoder's weights are parameters."""

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn

from pyro_avi.models.latent_decoder import LatentDecoder

__all__ = ["VAE"]


class VAE(LatentDecoder):
    r"""A deep latent variable model whose decoder is learned by maximum likelihood (through the ELBO).

    .. math:: z_n \sim N(0, I_K), \qquad x_n \sim p(x_n \mid \mathrm{decoder}(z_n))

    Together with an :class:`~pyro_avi.AmortizedGuide` it is the variational autoencoder.

    Args:
        decoder: a module with an attribute ``latent_dim`` (``K``), from ``[B, K]`` to ``[B, *shape]``.
        size: ``N``, the number of rows of the data set.
        likelihood: a module from the decoder's output to the distribution of every element; by default
            :class:`~pyro_avi.models.GaussianLikelihood` with standard deviation 1.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=100)
        >>> model().shape
        torch.Size([100, 1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, *, size: int, likelihood: nn.Module | None = None):
        super().__init__(cast(int, decoder.latent_dim), size=size, likelihood=likelihood)
        self.decoder = decoder

    def _decode(self) -> Callable[[Tensor], Tensor]:
        return self.decoder
