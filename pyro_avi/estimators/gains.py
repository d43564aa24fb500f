"""Whether one factor of a row does better than another, by the same draws of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gains", "cross_fitted", "gains"]


@dataclass(frozen=True)
class Gains:
    """What rows gain from one factor to another, in nats.

    Attributes:
        rows: ``[M]`` mean differences of log weights; ``nan`` where neither is a number.
        rows_se: ``[M]`` their standard errors, of the differences themselves: what both share of noise cancels.
        count: how many independent differences these are of.
    """

    rows: Tensor
    rows_se: Tensor
    count: int

    def significant(self, level: float = 0.05) -> Tensor:
        """``[M]`` which rows really gain: at most a share ``level`` of them, in expectation, do not.

        One-sided t-tests of all rows together, so that a row among thousands is not taken for one that gains because a
        thousand were looked at, and small gains are believed where many rows have them.

        Args:
            level: the expected share of false ones.

        References:
            Benjamini and Hochberg, "Controlling the false discovery rate", 1995,
            https://doi.org/10.1111/j.2517-6161.1995.tb02031.x. Wallace, "Bounds on normal approximations to Student's and
            the chi-square distributions", 1959, https://doi.org/10.1214/aoms/1177706093.
        """
        free = self.count - 1
        t = torch.where(self.rows > 0, self.rows / self.rows_se, 0.0).nan_to_num(nan=0.0, posinf=1e150)
        # Student's t as a normal score.
        score = (8 * free + 1) / (8 * free + 3) * (free * torch.log1p(t.square() / free)).sqrt()
        p = torch.special.ndtr(-score)
        ordered = p.sort().values
        share = level * torch.arange(1, len(p) + 1, dtype=p.dtype, device=p.device) / len(p)
        below = (ordered <= share).nonzero()
        return p <= ordered[below[-1]] if len(below) else torch.zeros_like(p, dtype=torch.bool)


def gains(before: Tensor, after: Tensor) -> Gains:
    """What rows gain, by log weights ``[S, M]`` of the same draws, each followed by its mirror image.

    Args:
        before, after: log weights of the two factors; without mirror images the pairs are as good as any.
    """
    pairs = (after - before).double().unflatten(0, (-1, 2)).mean(1)
    return Gains(pairs.mean(0), pairs.std(0) / len(pairs) ** 0.5, len(pairs))


def cross_fitted(before: Tensor, after: Tensor) -> Tensor:
    """``[S, M]`` log weights of the better of two factors of each row, none of which had a part in its choice.

    Half of the draws choose what the other half reports, and the other way round: where a row gains is the second factor
    taken, elsewhere the first. A choice by the draws that report it would report its luck.

    Args:
        before, after: ``[S, M]`` log weights of the same draws, each followed by its mirror image.

    Example::

        >>> import torch
        >>> from pyro_avi.estimators.gains import cross_fitted
        >>> noise = torch.randn(400, 2, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        >>> better = noise + torch.tensor([1.0, -1.0])
        >>> cross_fitted(noise, better).mean(0).round().tolist()
        [1.0, 0.0]
    """
    half = (torch.arange(len(before), device=before.device) // 2 % 2).bool()
    # A factor with draws of no density is none, in whichever half they are.
    finite = after.isfinite().all(0)
    takes = [finite & gains(before[part], after[part]).significant() for part in (half, ~half)]
    return torch.where(torch.where(half.unsqueeze(1), takes[1], takes[0]), after, before)
