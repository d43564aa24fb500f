"""What the decoder models share: the plate, the latents, the likelihood."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_avi.errors import CallError
from pyro_avi.models.likelihoods import GaussianLikelihood
from pyro_avi.rows.subsample import check_positions

__all__ = ["LatentDecoder"]


class LatentDecoder(PyroModule):
    r"""A latent vector for each row, decoded to the row's observation.

    .. math:: z_n \sim p(z), \qquad x_n \sim p(x_n \mid \mathrm{decoder}(z_n)), \qquad n = 1, \dots, N

    Subclasses are final and say where the decoder's weights come from, and the prior where it is not :math:`N(0, I_K)`.

    Args:
        latent_dim: ``K``.
        size: ``N``, the number of rows of the data set.
        likelihood: a module from the decoder's output to the distribution of every element.

    Raises:
        ValueError: if ``size`` is not positive.
    """

    def __init__(self, latent_dim: int, *, size: int, likelihood: Callable[[Tensor], Any] | None = None):
        super().__init__()
        if size < 1:
            raise ValueError(f"Expected size to be the number of rows of the data set, got {size}.")
        self.latent_dim, self.size = latent_dim, size
        # Any module; models with exact answers read the scale of theirs, which is a GaussianLikelihood.
        self.likelihood: Any = GaussianLikelihood() if likelihood is None else likelihood
        # Priors are built on it, so that they follow the model to another device or precision.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    @abstractmethod
    def _decode(self) -> Callable[[Tensor], Tensor]:
        """The decoder of this run of the model."""

    def _prior(self, count: int) -> dist.TorchDistribution:
        """The prior of so many rows' latents; standard normals unless a model has another."""
        return dist.Normal(self.zero.expand(count, self.latent_dim), 1.0).to_event(1)

    def forward(self, x: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            x: ``[B, *shape]`` the observations. Without ``index`` they are all rows of a data set, which may be another
                than the one of ``size`` rows: held-out rows have the same model. Left out, the model draws them.
            index: ``[B]`` the positions of a minibatch's rows among the ``size`` rows of the data set.

        Returns:
            The observations ``[B, *shape]``.

        Raises:
            ValueError: if ``x`` and ``index`` are of different numbers of rows, a position is none of the ``size`` rows, or a
                row of ``x`` is not of the shape that the decoder returns.
        """
        if x is not None and index is not None and len(x) != len(index):
            raise CallError(
                f"Expected one position in index for each of the {len(x)} rows of x, got {len(index)}.\n"
                "Pass model(x[index], index) for a minibatch, model(x) for a whole data set."
            )
        if index is not None:
            # Of a data set of another size, N / B would be wrong.
            check_positions("data", self.size, index)
        size = len(x) if x is not None and index is None else self.size
        decode = self._decode()
        with pyro.plate("data", size, subsample=index, dim=-1) as rows:
            z = pyro.sample("z", self._prior(len(rows)))
            output = decode(z)
            fn = self.likelihood(output).to_event(output.dim() - z.dim() + 1)
            # Other shapes would be broadcast, every row against every other.
            if x is not None and x.shape[1:] != fn.event_shape:
                raise CallError(f"Expected rows of x of shape {tuple(fn.event_shape)}, got {tuple(x.shape[1:])}.")
            return pyro.sample("x", fn, obs=x)
