"""Whether one factor of a row is better than another, by log weights of the same draws of both."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Gains", "cross_fitted", "gains"]


@dataclass(frozen=True)
class Gains:
    """How much higher the ELBO of each row is with one factor than with another, in nats.

    Attributes:
        rows: ``[M]`` mean differences of log weights; ``nan`` where one of the two is.
        rows_se: ``[M]`` the standard errors of these means; noise that both factors share cancels in the differences.
        count: the number of independent differences that the means are taken of.
    """

    rows: Tensor
    rows_se: Tensor
    count: int

    def significant(self, level: float = 0.05) -> Tensor:
        """``[M]`` which rows gain significantly.

        One-sided t-tests of all rows, at a controlled false discovery rate: of the rows named, at most a share ``level`` is
        expected not to gain. Among thousands of rows single large differences are then not taken for gains, and small ones
        count where many rows have them.

        Args:
            level: the false discovery rate.

        References:
            Benjamini and Hochberg, "Controlling the false discovery rate", 1995,
            https://doi.org/10.1111/j.2517-6161.1995.tb02031.x. Wallace, "Bounds on normal approximations to Student's and
            the chi-square distributions", 1959, https://doi.org/10.1214/aoms/1177706093.
        """
        free = self.count - 1
        t = torch.where(self.rows > 0, self.rows / self.rows_se, 0.0).nan_to_num(nan=0.0, posinf=1e150)
        # The normal quantile of Student's t (Wallace).
        score = (8 * free + 1) / (8 * free + 3) * (free * torch.log1p(t.square() / free)).sqrt()
        p = torch.special.ndtr(-score)
        ordered = p.sort().values
        share = level * torch.arange(1, len(p) + 1, dtype=p.dtype, device=p.device) / len(p)
        below = (ordered <= share).nonzero()
        return p <= ordered[below[-1]] if len(below) else torch.zeros_like(p, dtype=torch.bool)


def gains(before: Tensor, after: Tensor) -> Gains:
    """How much rows gain, by log weights ``[S, M]`` of the same draws, each followed by its mirror image.

    Args:
        before, after: log weights of the two factors. Draws without mirror images may be paired in any order.
    """
    pairs = (after - before).double().unflatten(0, (-1, 2)).mean(1)
    return Gains(pairs.mean(0), pairs.std(0) / len(pairs) ** 0.5, len(pairs))


def cross_fitted(before: Tensor, after: Tensor) -> Tensor:
    """``[S, M]`` log weights of the better of two factors of each row, which is chosen by other draws than it is reported by.

    Each half of the draws chooses for the other half: the second factor where the row gains significantly, elsewhere the
    first. A factor that is chosen and reported by the same draws would look better than it is.

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
    # A factor with a draw of weight zero is not chosen, in whichever half the draw is.
    finite = after.isfinite().all(0)
    takes = [finite & gains(before[part], after[part]).significant() for part in (half, ~half)]
    return torch.where(torch.where(half.unsqueeze(1), takes[1], takes[0]), after, before)
