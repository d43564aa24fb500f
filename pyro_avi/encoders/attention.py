"""The encoder of series by attention."""

import math

import torch
from torch import Tensor, nn

from pyro_avi.encoders.mlp import MLP
from pyro_avi.encoders.sequence import SequenceEncoder

__all__ = ["Attention"]


class Attention(SequenceEncoder):
    r"""Every row of a series attends to all rows that are there, by their values and positions.

    .. math:: a_n = u_n + \sum_m \mathrm{softmax}_m \Big( \frac{q_n^\top k_m}{\sqrt{d}} + b_{|n - m|} \Big) \, v_m, \qquad
              h_n = a_n + \mathrm{MLP}(a_n)

    with :math:`u_n` linear in :math:`x_n` and sinusoids of n; :math:`b`, one number a distance and head that falls linearly
    with a slope of its own, lets heads look near or far. Time and memory are quadratic in the number of rows.

    Args:
        in_features: the number of values of a row.
        features: ``H``.
        heads: the number of heads, which divides ``H``.

    Raises:
        ValueError: if a number is not a positive whole one, or the heads do not divide the features.

    References:
        Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762.
        Press, Smith and Lewis, "Train Short, Test Long", 2022, https://arxiv.org/abs/2108.12409.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import Attention
        >>> encoder, x = Attention(2, 8, heads=2), torch.rand(5, 2)
        >>> encoder(x).shape, encoder(torch.rand(3, 5, 2)).shape
        (torch.Size([5, 8]), torch.Size([3, 5, 8]))
    """

    def __init__(self, in_features: int, features: int, *, heads: int = 4):
        super().__init__(in_features)
        MLP.check_widths((features, heads))
        if features % heads:
            raise ValueError(f"Expected heads that divide the {features} features, got {heads}.")
        self.heads = heads
        self.embed = nn.Linear(2 * in_features, features)
        self.queries_keys_values = nn.Linear(features, 3 * features)
        # From a reach of about one row to one of hundreds.
        self.slopes = nn.Parameter(2.0 ** -torch.arange(1.0, heads + 1) * 2)
        self.above = nn.Sequential(nn.Linear(features, 2 * features), nn.SiLU(), nn.Linear(2 * features, features))

    def _encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        series, count, _ = values.shape
        at = torch.arange(count, device=values.device)
        embedded = self.embed(values)
        embedded = embedded + _sinusoids(at.to(values.dtype), embedded.shape[-1])
        projected = self.queries_keys_values(embedded).reshape(series, count, 3, self.heads, -1)
        queries, keys, carried = projected.permute(2, 0, 3, 1, 4)
        distance = (at.unsqueeze(-1) - at).abs().to(values.dtype)
        scores = queries @ keys.mT / math.sqrt(keys.shape[-1]) - self.slopes.view(-1, 1, 1) * distance
        # A row of a series without any value attends to itself.
        seen = (at < lengths.unsqueeze(-1)).unsqueeze(1) | torch.eye(count, dtype=torch.bool, device=at.device)
        weights = scores.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1)
        attended = embedded + (weights @ carried).transpose(1, 2).reshape(series, count, -1)
        return attended + self.above(attended)


def _sinusoids(at: Tensor, features: int) -> Tensor:
    """``[N, features]`` sines and cosines of positions, of wavelengths from a few rows to thousands."""
    frequencies = 10_000.0 ** -(torch.arange(features, device=at.device, dtype=at.dtype) // 2 * 2 / features)
    phase = math.pi / 2 * (torch.arange(features, device=at.device, dtype=at.dtype) % 2)
    return (at.unsqueeze(-1) * frequencies + phase).sin()
