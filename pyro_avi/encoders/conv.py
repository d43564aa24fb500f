"""The convolutional encoder for images."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["Conv"]


class Conv(nn.Module):
    """Strided 3x3 convolutions that halve height and width, then one linear layer.

    Args:
        in_channels: the number of channels of an image.
        image_size: its height and width in pixels.
        channels: the number of channels of each convolution.
        features: ``H``, the number of units of the last layer.
        activation: makes a module for the nonlinearity after each layer.

    Raises:
        ValueError: if a number is not a positive whole one, there is no convolution, or the image is too small to be halved
            that often.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import Conv
        >>> encoder, x = Conv(1, (28, 28), features=64), torch.rand(5, 1, 28, 28)
        >>> encoder(x).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        in_channels: int,
        image_size: tuple[int, int],
        *,
        channels: Sequence[int] = (16, 32),
        features: int = 64,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ):
        super().__init__()
        for number in (in_channels, *image_size, *channels, features):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(
                    f"Expected channels, image size and features that are whole numbers of at least 1, got {number!r}."
                )
        if not channels:
            raise ValueError("Expected the channels of at least one convolution, got none.")
        if min(image_size) < 2 ** len(channels):
            raise ValueError(
                f"Expected images of at least {2 ** len(channels)} pixels a side for {len(channels)} halvings, got "
                f"{tuple(image_size)}."
            )
        height, width = (-(-size // 2 ** len(channels)) for size in image_size)
        layers = [
            layer
            for a, b in pairwise((in_channels, *channels))
            for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), activation())
        ]
        self.layers = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels[-1] * height * width, features), activation()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, H]`` of images ``x [B, C, height, width]``."""
        return self.layers(x)
