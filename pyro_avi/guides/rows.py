"""The rows that a guide draws in the model's stead."""

import torch
from pyro.distributions.distribution import Distribution
from torch import Tensor

__all__ = ["DrawnRows"]


class DrawnRows(Distribution):
    """``count`` of ``size`` rows, without replacement; its log probability is 0, as that of a plate's own draw.

    A class of its own rather than the plate's: ``pyro.infer.Predictive`` forgets the plates' draws of a guide and would
    pair the latents of some rows with the data of others.

    Args:
        size: ``N``.
        count: ``B``.
        depth: the number of dimensions of the model's plates; ``Predictive`` would give dimensions to a sample with fewer.
        device: of the rows.
    """

    has_rsample = True
    event_shape = torch.Size()

    def __init__(self, size: int, count: int, depth: int, device: torch.device):
        self.size, self.count, self.device = size, count, device
        self.batch_shape = torch.Size([1] * (depth - 1) + [count])

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draw the rows ``[count]``."""
        return torch.randperm(self.size, device=self.device)[: self.count].clone()

    def log_prob(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Zero: the plate's scale accounts for the rows left out."""
        return torch.zeros((), device=self.device)
