"""The tail of importance weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.display.formatting import counted, with_error
from pyro_avi.estimators.estimate import Estimate, HasLogWeights, MeanOfRows, check_log_weights
from pyro_avi.estimators.iwelbo import ess

__all__ = ["TailIndex", "khat"]

# Draws of which a fifth is a tail of five, the shortest that is fitted.
_LEAST = 25
# Log weights of float32 models agree to about this; a tail no wider than that has no shape.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class TailIndex(Estimate):
    """Pareto tail indices of rows, and for which rows estimates from these weights are unreliable.

    Attributes:
        value: that of the worst row.
        se: its standard error.
        rows: ``[B]``, without a unit; ``-inf`` where the weights of the tail are all equal.
        rows_se: ``[B]`` asymptotic standard errors, ``(1 + k) / sqrt(M)`` for a tail of ``M`` draws.
        threshold: ``min(1 - 1 / log10(S), 0.7)``, above which estimates from ``S`` draws are unreliable.
        ess: ``[B]`` effective sample sizes, to be read together with the indices.
        num_samples: ``S``.
    """

    threshold: float = 0.7
    ess: Tensor | None = None
    num_samples: int = 0

    def __repr__(self) -> str:
        worst = f"{with_error(self.value, self.se)} in the worst of {counted(self.rows.numel(), 'row')}"
        return f"TailIndex({worst}, {int(self.unreliable.sum()):,} above {self.threshold:.2f})"

    @property
    def per_row(self) -> MeanOfRows:
        """Raises an ``AttributeError``: an index is no sum over rows."""
        raise AttributeError("A tail index has no mean per row: look at its rows, and at unreliable.")

    @property
    def unreliable(self) -> Tensor:
        """``[B]`` which rows are above the threshold."""
        return self.rows > self.threshold


def khat(weights: HasLogWeights) -> TailIndex:
    r"""The Pareto tail index of every row's weights, as in Pareto-smoothed importance sampling.

    A generalized Pareto distribution is fitted to the ``M = min(S / 5, 3 sqrt(S))`` largest weights. Its index :math:`k`
    says which moments the weights have: a variance below 1/2, a mean below 1; a positive index is a heavy tail. Log weights
    are larger where a draw is more probable under the model than under the guide, as in ArviZ 0.23; ArviZ 1 takes their
    negatives.

    **Caveat.** The index describes the largest weights of these draws. With few draws it says little: for a guide that is
    almost exact it can be above 3 at 4,000 draws and 0.35 at 20,000, though the effective sample size is 98 %. And no draw
    shows a mode that the guide has never visited. Read it together with the effective sample size, which the result holds,
    and with the evidence gap, and repeat it with more draws before you reject a row. With global latents it is the index of
    the local weights, each at its own draw of :math:`\theta`.

    Args:
        weights: from :func:`~pyro_avi.log_weights`, at least 25 draws, better thousands.

    Returns:
        The index of every row with its standard error, and ``unreliable``, the rows above the threshold.

    Raises:
        ValueError: if there are fewer than 25 draws, or a weight is ``nan`` or infinite.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646. Zhang and Stephens, "A new and efficient estimation method for the generalized
        Pareto distribution", 2009, https://doi.org/10.1198/tech.2009.08017.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> u = torch.rand(4000, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        >>> weights = avi.LogWeights(torch.stack([-0.2 * u.log(), -1.2 * u.log()], 1), torch.zeros(4000), scale=1.0)
        >>> index = avi.khat(weights)
        >>> index
        TailIndex(1.30 ± 0.17 in the worst of 2 rows, 1 above 0.70)
        >>> index.unreliable.tolist()
        [False, True]
    """
    local = check_log_weights(weights)
    count = len(local)
    if count < _LEAST:
        raise ValueError(f"Expected at least {_LEAST} draws, of which a fifth is the tail, got {count}.")
    length = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    # Relative to the largest, in ascending order; a weight of zero is replaced by the smallest number.
    tail = (local - local.amax(0)).topk(length + 1, dim=0).values.flip(0).clamp(min=math.log(2.3e-308))
    excess = tail[1:].exp() - tail[:1].exp()
    flat = -tail[0] <= _ROUNDING
    rows = _pareto_index(torch.where(flat, torch.linspace(0.5, 1, length).to(excess)[:, None], excess))
    rows = torch.where(flat, -torch.inf, rows)
    errors = torch.where(flat, 0.0, (1 + rows).abs() / length**0.5)
    worst = int(rows.argmax())
    return TailIndex(
        value=rows[worst].item(),
        se=errors[worst].item(),
        rows=rows,
        rows_se=errors,
        threshold=min(1 - 1 / math.log10(count), 0.7),
        ess=ess(weights),
        num_samples=count,
    )


def _pareto_index(excess: Tensor) -> Tensor:
    """``[B]`` the index of generalized Pareto distributions with ``excess [M, B]`` above their thresholds, ascending.

    The posterior mean of ``b = -k / sigma`` over a grid, with the index of maximal likelihood at each point (Zhang and
    Stephens); the index is then shrunk towards 1/2 with the weight of ten draws.
    """
    count = len(excess)
    # A tie with the threshold is no excess; the least number keeps logarithms finite.
    excess = excess.clamp(min=1e-300)
    grid = 30 + math.isqrt(count)
    quartile = excess[int(count / 4 + 0.5) - 1]
    steps = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device).unsqueeze(1)
    b = (1 - (grid / (steps - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[-1]
    # One grid point at a time, so that no tensor is larger than the excesses themselves.
    k = torch.stack([torch.log1p(-point * excess).mean(0) for point in b])
    likelihood = count * ((-b / k).log() - k - 1)
    mean = (likelihood.softmax(0) * b).sum(0)
    return (count * torch.log1p(-mean * excess).mean(0) + 5) / (count + 10)
