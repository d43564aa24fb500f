"""The recurrent encoder of series."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pyro_avi.encoders.mlp import MLP
from pyro_avi.encoders.sequence import SequenceEncoder

__all__ = ["Recurrent"]


class Recurrent(SequenceEncoder):
    r"""Two gated recurrent networks over the rows of a series, one from either end, and a multilayer perceptron.

    .. math:: h_n = \mathrm{MLP}(\overrightarrow g_n, \overleftarrow g_n), \qquad
              \overrightarrow g_n = \mathrm{GRU}(x_n, \overrightarrow g_{n-1}), \qquad
              \overleftarrow g_n = \mathrm{GRU}(x_n, \overleftarrow g_{n+1})

    Time and memory are linear in the number of rows.

    Args:
        in_features: the number of values of a row.
        widths: the number of units of each recurrent network, and those of the layers above them; the last one is ``H``.
        activation: makes a module for the nonlinearity after each of these layers.

    Raises:
        ValueError: if a number is not a positive whole one, or there is no width.

    References:
        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, https://arxiv.org/abs/1406.1078.

    Example::

        >>> import torch
        >>> from pyro_avi.encoders import Recurrent
        >>> encoder, x = Recurrent(2, (16, 8)), torch.rand(5, 2)
        >>> encoder(x).shape, encoder(torch.rand(3, 5, 2)).shape
        (torch.Size([5, 8]), torch.Size([3, 5, 8]))
    """

    def __init__(self, in_features: int, widths: Sequence[int], *, activation: Callable[[], nn.Module] = nn.SiLU):
        super().__init__(in_features)
        first, *_ = widths = MLP.check_widths(widths)
        self.forwards = nn.GRU(2 * in_features, first, batch_first=True)
        self.backwards = nn.GRU(2 * in_features, first, batch_first=True)
        self.above = MLP(2 * first, widths[1:] or (first,), activation=activation)

    def _encode(self, values: Tensor, lengths: Tensor) -> Tensor:
        count = values.shape[1]
        # Each series turned around within its own length: what follows it stays behind.
        at = torch.arange(count, device=values.device)
        turned = torch.where(at < lengths.unsqueeze(-1), lengths.unsqueeze(-1) - 1 - at, at).unsqueeze(-1)
        before = self.forwards(values)[0]
        after = self.backwards(values.gather(1, turned.expand_as(values)))[0]
        after = after.gather(1, turned.expand_as(after))
        features = torch.cat([before, after], -1)
        return self.above(features.flatten(0, 1)).unflatten(0, features.shape[:2])
