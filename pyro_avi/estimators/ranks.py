"""Whether ranks are uniform: simultaneous bands around their distribution function."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["UniformBand", "rank_among"]


def rank_among(value: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """How many draws lie below a value, and how many tie with it: ``[...]`` each.

    Args:
        value: ``[...]``.
        draws: ``[S, ...]``.
    """
    return (draws < value).sum(0), (draws == value).sum(0)


class UniformBand:
    r"""A simultaneous band around the distribution function of ``N`` independent ranks, uniform on ``0, ..., S``.

    The number of ranks below :math:`t` is binomial, :math:`B(N, t / (S + 1))`. The statistic is the smallest two-sided tail
    probability over the thresholds,

    .. math:: \gamma = 2 \min_t \min \left( P(B_t \le R_t), P(B_t \ge R_t) \right)

    and its distribution is found from simulated uniform ranks, which accounts for ties and for the dependence between
    thresholds. The band at a level contains the distribution functions whose p-value is above it: figure and test agree.

    Args:
        num_rows: ``N``.
        num_samples: ``S``.

    References:
        Säilynoja, Bürkner and Vehtari, "Graphical test for discrete uniformity and its applications in goodness-of-fit
        evaluation and multiple sample comparison", 2022, https://arxiv.org/abs/2103.10522.
    """

    _most_thresholds, _trials = 100, 2_000

    def __init__(self, num_rows: int, num_samples: int):
        self._rows, count = num_rows, num_samples + 1
        self._thresholds = np.unique(np.linspace(0, count, min(count, self._most_thresholds) + 1).round().astype(int))
        # Thresholds 0 and S + 1 have no ranks below, and all.
        self._shares = self._thresholds[1:-1] / count
        draws = np.random.default_rng(0).multinomial(num_rows, np.diff(self._thresholds) / count, size=self._trials)
        self._simulated = np.sort(self._gamma(draws.cumsum(1)[:, :-1]))

    @property
    def shares(self) -> Tensor:
        """``[T]`` the distribution function of uniform ranks at the thresholds."""
        return torch.from_numpy(self._shares)

    def p_values(self, ranks: Tensor) -> Tensor:
        """``[Q]`` the probability of a statistic as small under uniform ranks, at least 1/2001.

        Args:
            ranks: ``[N, Q]``.
        """
        gamma = self._gamma(self._below(ranks))
        at_most = np.searchsorted(self._simulated, gamma * (1 + 1e-9), side="right")
        return torch.from_numpy((1 + at_most) / (1 + self._trials))

    def distribution(self, ranks: Tensor) -> Tensor:
        """``[T, Q]`` the share of the ranks below every threshold.

        Args:
            ranks: ``[N, Q]``.
        """
        return torch.from_numpy(self._below(ranks).T / self._rows)

    def band(self, prob: float) -> tuple[Tensor, Tensor]:
        """``[T]`` the ends of the band, in which a share ``prob`` of samples of uniform ranks stays everywhere.

        Args:
            prob: between 0 and 1.
        """
        from scipy.stats import binom

        tail = self._simulated[int((1 - prob) * self._trials)] / 2
        low, high = binom.ppf(tail, self._rows, self._shares), binom.isf(tail, self._rows, self._shares)
        return torch.from_numpy(low / self._rows), torch.from_numpy(high / self._rows)

    def _below(self, ranks: Tensor) -> np.ndarray:
        """``[Q, T]`` the number of ranks below every threshold."""
        columns = np.sort(ranks.T.numpy())
        return np.stack([np.searchsorted(column, self._thresholds[1:-1]) for column in columns])

    def _gamma(self, below: np.ndarray) -> np.ndarray:
        from scipy.special import bdtr, bdtrc

        at_most, at_least = bdtr(below, self._rows, self._shares), bdtrc(below - 1, self._rows, self._shares)
        return 2 * np.minimum(at_most, at_least).min(-1)
