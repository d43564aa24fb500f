"""Networks from a latent vector to the parameters of an observation."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod

from torch import Tensor, nn

__all__ = ["ConvDecoder", "DenseDecoder"]

LeakyReLU = partial(nn.LeakyReLU, 0.2)


class DenseDecoder(nn.Module):
    """Linear layers with a nonlinearity between them, the last one reshaped to an observation.

    Args:
        latent_dim: ``K``.
        widths: the number of units of each hidden layer.
        shape: the shape of an observation, for images ``(channels, height, width)``.
        activation: makes a module for the nonlinearity.

    Raises:
        ValueError: if a size is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> avi.models.DenseDecoder(2, (16, 16), (1, 8, 8))(torch.zeros(5, 2)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        latent_dim: int,
        widths: Sequence[int],
        shape: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = LeakyReLU,
    ):
        super().__init__()
        _check_positive(latent_dim, *widths, *shape)
        self.latent_dim, self.shape = latent_dim, tuple(shape)
        sizes = (latent_dim, *widths, prod(shape))
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
        self.layers = nn.Sequential(*layers[:-1], nn.Unflatten(-1, self.shape))

    def forward(self, z: Tensor) -> Tensor:
        """``[B, *shape]`` of latents ``z [B, K]``."""
        return self.layers(z)


class ConvDecoder(nn.Module):
    """A linear layer to a small image with many channels, doubled in height and width until it is large enough.

    Args:
        latent_dim: ``K``.
        shape: ``(channels, height, width)`` of an observation; surplus rows and columns are cut off.
        channels: the number of channels before each doubling.
        activation: makes a module for the nonlinearity.

    Raises:
        ValueError: if a size is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> avi.models.ConvDecoder(2, (1, 28, 28))(torch.zeros(5, 2)).shape
        torch.Size([5, 1, 28, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 16),
        activation: Callable[[], nn.Module] = LeakyReLU,
    ):
        super().__init__()
        _check_positive(latent_dim, *channels, *shape)
        self.latent_dim, self.shape = latent_dim, tuple(shape)
        out_channels, *size = shape
        small = [-(-pixels // 2 ** len(channels)) for pixels in size]
        doublings = [
            layer
            for a, b in pairwise((*channels, out_channels))
            for layer in (activation(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1))
        ]
        first = nn.Linear(latent_dim, channels[0] * prod(small))
        self.layers = nn.Sequential(first, nn.Unflatten(-1, (channels[0], *small)), *doublings)

    def forward(self, z: Tensor) -> Tensor:
        """``[B, *shape]`` of latents ``z [B, K]``."""
        _, height, width = self.shape
        images = self.layers(z.reshape(-1, self.latent_dim))[..., :height, :width]
        return images.reshape(z.shape[:-1] + self.shape)


def _check_positive(*sizes: int) -> None:
    for size in sizes:
        if size < 1:
            raise ValueError(f"Expected positive sizes of the decoder, got {size}.")
