"""Noise on what an encoder reads."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Noise"]


class Noise(nn.Module):
    r"""Adds normal noise while it trains, and nothing in evaluation mode: a layer before an encoder.

    .. math:: \tilde x = x + \sigma \epsilon, \qquad \epsilon \sim N(0, I)

    The encoder of a guide learns from corrupted rows while the model is given the rows themselves, which is the denoising
    criterion; it overfits less to the rows of the training. ``torch.nn.Dropout`` in its place sets elements to zero instead.

    Args:
        scale: :math:`\sigma`, the standard deviation of the noise in units of the inputs.

    Raises:
        ValueError: if ``scale`` is negative or not finite.

    References:
        Im, Ahn, Memisevic and Bengio, "Denoising Criterion for Variational Auto-Encoding Framework", 2017,
        https://arxiv.org/abs/1511.06406. Vincent, Larochelle, Bengio and Manzagol, "Extracting and composing robust features
        with denoising autoencoders", 2008, https://doi.org/10.1145/1390156.1390294.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import MLP, Noise
        >>> encoder, x = torch.nn.Sequential(Noise(0.1), MLP(64, (32, 16))).eval(), torch.rand(5, 1, 8, 8)
        >>> encoder(x).shape
        torch.Size([5, 16])
    """

    def __init__(self, scale: float):
        super().__init__()
        if not 0 <= scale < math.inf:
            raise ValueError(f"Expected scale to be a number of at least 0, got {scale!r}.")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Rows ``x [B, ...]`` with the noise, of the same shape."""
        return x + self.scale * torch.randn_like(x) if self.training else x

    def extra_repr(self) -> str:
        """What a print of the module shows of it."""
        return str(self.scale)
