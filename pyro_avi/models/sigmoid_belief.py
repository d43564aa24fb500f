"""A decoder of bits: binary latents for each row."""

from collections.abc import Callable
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_avi.models.latent_decoder import LatentDecoder
from pyro_avi.models.likelihoods import BernoulliLikelihood

__all__ = ["SigmoidBelief"]


class SigmoidBelief(LatentDecoder):
    r"""A deep latent variable model of bits: a sigmoid belief network where the decoder is linear.

    .. math:: z_{nk} \sim \mathrm{Bernoulli}(1 / (1 + e^{-b_k})), \qquad x_n \sim p(x_n \mid \mathrm{decoder}(z_n))

    No draw can be differentiated through: how to train it says :doc:`/gradients`. With few bits its evidence is a sum.

    Args:
        decoder: a module with an attribute ``latent_dim`` (``K``), from ``[B, K]`` to ``[B, *shape]``.
        size: ``N``, the number of rows of the data set.
        likelihood: a module from the decoder's output to the distribution of every element; by default
            :class:`~pyro_avi.models.BernoulliLikelihood`.

    Attributes:
        logits: ``[K]`` the prior's, parameters of the model that start at 0.

    References:
        Neal, "Connectionist Learning of Belief Networks", 1992, https://doi.org/10.1016/0004-3702(92)90065-6.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> model = avi.models.SigmoidBelief(avi.models.DenseDecoder(3, (), (1, 8, 8)), size=100)
        >>> model().shape
        torch.Size([100, 1, 8, 8])
        >>> model.log_evidence(model()).shape
        torch.Size([100])
    """

    def __init__(self, decoder: nn.Module, *, size: int, likelihood: Callable[[Tensor], Any] | None = None):
        latent_dim = cast(int, decoder.latent_dim)
        super().__init__(latent_dim, size=size, likelihood=BernoulliLikelihood() if likelihood is None else likelihood)
        self.decoder = decoder
        self.logits = nn.Parameter(torch.zeros(latent_dim))

    def _decode(self) -> Callable[[Tensor], Tensor]:
        return self.decoder

    def _prior(self, count: int) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.logits.expand(count, self.latent_dim)).to_event(1)

    def log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""All values of a row's bits, and :math:`\log p(x_n, z)` at each.

        Args:
            x: ``[N, *shape]``.

        Returns:
            ``[2^K, K]`` the values, and ``[N, 2^K]``.

        Raises:
            ValueError: if there are more than 16 bits.
        """
        if self.latent_dim > 16:
            raise ValueError(f"Expected at most 16 bits to sum over, got {self.latent_dim}.")
        bits = torch.tensor([0.0, 1.0]).to(self.logits)
        values = torch.cartesian_prod(*[bits] * self.latent_dim).reshape(-1, self.latent_dim)
        fn = self.likelihood(self.decoder(values))
        of_rows = fn.log_prob(x.unsqueeze(1)).flatten(2).sum(-1)
        return values, of_rows + self._prior(len(values)).log_prob(values)

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""``[N]`` the exact :math:`\log p(x_n)`, a sum over all values of the bits.

        Args:
            x: ``[N, *shape]``.

        Raises:
            ValueError: if there are more than 16 bits.
        """
        return self.log_joint(x)[1].logsumexp(-1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """The exact posterior over the ``2^K`` values of a row's bits, in the order of :meth:`log_joint`.

        Args:
            x: ``[N, *shape]``.

        Raises:
            ValueError: if there are more than 16 bits.
        """
        return dist.Categorical(logits=self.log_joint(x)[1])
