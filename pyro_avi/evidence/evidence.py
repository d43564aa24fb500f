"""The log evidence of every row, known or bounded, and gaps below it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.estimators import Estimate, iwelbo, khat

__all__ = ["Evidence", "HasEvidence", "exact_evidence", "paired_mean", "with_refinement_error"]

# Standard errors above which a bound is taken for the better one.
_HIGHER = 2.0


@runtime_checkable
class HasEvidence(Protocol):
    """A model that knows the log evidence of its rows."""

    def log_evidence(self, *args) -> Tensor:
        """``[N]`` the log evidence of every row, in nats."""
        ...


class Evidence:
    """The log evidence of every row, or the best of several bounds on it, and what its draws do to it.

    Args:
        exact: ``[N]`` log evidences, if they are known.
        weights: of the best factors, each draw followed by its mirror image.
        others: independent of these and of each other: of a mixture of proposals, of annealed importance sampling. One of them
            takes the place of a bound that it is significantly above.
    """

    def __init__(self, exact: Tensor | None, weights: LogWeights, others: Sequence[LogWeights] = ()):
        local = weights.local
        self._scale = weights.scale
        self._influence, self._variance = torch.zeros_like(local), torch.zeros_like(local[0])
        self._bias = torch.zeros_like(local[0])
        self.unreliable = torch.zeros_like(local[0], dtype=torch.bool)
        if exact is not None:
            self._rows = exact.to(local)
            return
        estimate = iwelbo(weights)
        self._rows, self._bias = estimate.rows, estimate.rows_bias
        self._influence, self.unreliable = len(local) * local.softmax(0) - 1, khat(weights).unreliable
        self._error = estimate.rows_se
        for other in others:
            self._compare(other)

    def _compare(self, weights: LogWeights) -> None:
        """Take another bound where it is better, and know by it which rows to doubt."""
        other, doubtful = iwelbo(weights), khat(weights).unreliable
        apart = (other.rows - self._rows) / torch.hypot(other.rows_se, self._error).clamp(min=1e-300)
        # The higher of two bounds that say the same would be the luckier one.
        better = (apart > _HIGHER) | (self.unreliable & ~doubtful & (apart > 0))
        # A bound that is only about to be the better one is a reason for doubt. Where both say the same, one tail without
        # doubt is enough.
        hint = doubtful & (apart > 0.5 * _HIGHER)
        self.unreliable = torch.where(better, doubtful, (self.unreliable & (doubtful | (apart.abs() > 5))) | hint)
        self._rows = torch.where(better, other.rows, self._rows)
        self._bias = torch.where(better, other.rows_bias, self._bias)
        self._influence = torch.where(better, 0.0, self._influence)
        self._error = torch.where(better, other.rows_se, self._error)
        self._variance = torch.where(better, other.rows_se.square(), self._variance)

    def above(self, local: Tensor) -> Estimate:
        """How far it lies above the mean of log weights ``[S, N]`` of the same draws."""
        mean = local.mean(0)
        return _estimate(self._rows - mean, self._influence - (local - mean), self._scale, self._variance)

    def slack(self, upper: LogWeights | None) -> Estimate:
        """How far the log evidence may lie above it; the total is that of the rows where this is known."""
        rows, error = torch.where(self.unreliable, torch.inf, -self._bias), torch.zeros_like(self._bias)
        if upper is not None:
            inverse = iwelbo(replace(upper, local=-upper.local))
            rows, error = (-inverse.rows - self._rows).clamp(min=0.0), inverse.rows_se
        known = rows[rows.isfinite()]
        return Estimate(self._scale * known.sum().item(), self._scale * error.norm().item(), rows, error)


def paired_mean(values: Tensor, scale: float) -> Estimate:
    """The mean over draws of ``values [S, N]``, each followed by that of its mirror image, by row and in total."""
    mean = values.mean(0)
    return _estimate(mean, values - mean, scale, torch.zeros_like(mean))


def with_refinement_error(gap: Estimate, left, scale: float) -> Estimate:
    """An approximation gap whose error covers what the best factors found may lack of the best there are.

    Args:
        gap: with the error of its draws.
        left: what the rows may still gain, with ``rows`` and ``rows_se [N]``.
        scale: by which rows count in the total.
    """
    lack, error = left.rows.nan_to_num(nan=torch.inf), left.rows_se.nan_to_num(nan=torch.inf)
    rows = lack.clamp(min=0.0) + error
    total = scale * (lack.sum().clamp(min=0.0) + error.norm()).item()
    return replace(gap, se=math.hypot(gap.se, total), rows_se=torch.hypot(gap.rows_se, rows))


def _estimate(rows: Tensor, influence: Tensor, scale: float, variance: Tensor) -> Estimate:
    """An estimate whose error is the mean of what each draw adds ``[S, N]``, and an independent part of each row."""
    # A draw and its mirror image are one.
    pairs = influence.unflatten(0, (-1, 2)).mean(1)
    return Estimate(
        value=scale * rows.sum().item(),
        se=scale * (pairs.sum(1).var() / len(pairs) + variance.sum()).sqrt().item(),
        rows=rows,
        rows_se=(pairs.var(0) / len(pairs) + variance).sqrt(),
    )


def exact_evidence(model: Callable, args: tuple, given: Tensor | None, count: int) -> Tensor | None:
    """``[N]`` the exact log evidences, if somebody knows them."""
    if given is None and isinstance(model, HasEvidence):
        with torch.no_grad():
            given = model.log_evidence(*args)
    if given is None:
        return None
    given = torch.as_tensor(given).detach()
    if count == 1:
        # Of all rows together, where something ties them.
        given = given.reshape(-1)
    if given.shape != (count,) or not given.isfinite().all():
        raise ValueError(
            f"Expected a finite log evidence for each of the {count} rows, got shape {tuple(given.shape)}"
            f"{'' if given.isfinite().all() else ' with values that are no numbers'}."
        )
    return given.double()
