"""The log evidence of every row, known or bounded, and gaps below it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.estimators import Estimate, iwelbo, khat

__all__ = ["Evidence", "HasEvidence", "exact_evidence", "paired_mean", "with_refinement_error"]

# A bound replaces another if it is higher by more than this many standard errors.
_HIGHER = 2.0


@runtime_checkable
class HasEvidence(Protocol):
    """A model with the exact log evidence of its rows."""

    def log_evidence(self, *args) -> Tensor:
        """``[N]`` the log evidence of every row, in nats."""
        ...


class Evidence:
    """The log evidence of every row, or the best of several lower bounds on it, with the influence of each draw.

    Args:
        exact: ``[N]`` log evidences, if they are known.
        weights: log weights of the best factors, each draw followed by its mirror image.
        others: log weights of other estimates, independent of these and of each other: of a mixture of proposals, of annealed
            importance sampling. One of them replaces a bound that it is significantly above.
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
        self._rows, self._error, self._bias = _bounds(weights)
        self._influence, self.unreliable = len(local) * local.softmax(0) - 1, khat(weights).unreliable
        for other in others:
            self._compare(other)

    def _compare(self, weights: LogWeights) -> None:
        """Use another bound in the rows where it is better, and update which rows are unreliable."""
        (rows, error, bias), doubtful = _bounds(weights), khat(weights).unreliable
        apart = (rows - self._rows) / torch.hypot(error, self._error).clamp(min=1e-300)
        # Of two bounds that agree, the higher one would be chosen for its noise.
        better = (apart > _HIGHER) | (self.unreliable & ~doubtful & (apart > 0))
        # A heavy-tailed bound that is somewhat higher makes the row unreliable. Where both bounds agree, one of them with a
        # light tail is enough for a reliable row.
        hint = doubtful & (apart > 0.5 * _HIGHER)
        self.unreliable = torch.where(better, doubtful, (self.unreliable & (doubtful | (apart.abs() > 5))) | hint)
        self._rows = torch.where(better, rows, self._rows)
        self._bias = torch.where(better, bias, self._bias)
        self._influence = torch.where(better, 0.0, self._influence)
        self._error = torch.where(better, error, self._error)
        self._variance = torch.where(better, error.square(), self._variance)

    def above(self, local: Tensor) -> Estimate:
        """The evidence minus the mean of log weights ``[S, N]`` of the same draws."""
        mean = local.mean(0)
        return _estimate(self._rows - mean, self._influence - (local - mean), self._scale, self._variance)

    def slack(self, upper: LogWeights | None) -> Estimate:
        """How far the log evidence may lie above the bound; the total is over the rows where this is known."""
        rows, error = torch.where(self.unreliable, torch.inf, -self._bias), torch.zeros_like(self._bias)
        if upper is not None:
            inverse, error, _ = _bounds(replace(upper, local=-upper.local))
            rows = (-inverse - self._rows).clamp(min=0.0)
        known = rows[rows.isfinite()]
        return Estimate(
            value=self._scale * known.sum().item(),
            se=self._scale * error.norm().item(),
            rows=rows,
            rows_se=error,
            scale=self._scale,
        )


def _bounds(weights: LogWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The importance-weighted bounds of the rows, their standard errors and their biases, ``[N]`` each."""
    estimate = iwelbo(weights)
    return estimate.rows, cast(Tensor, estimate.rows_se), cast(Tensor, estimate.rows_bias)


def paired_mean(values: Tensor, scale: float) -> Estimate:
    """The mean of ``values [S, N]`` over draws, each followed by its mirror image; by row and in total."""
    mean = values.mean(0)
    return _estimate(mean, values - mean, scale, torch.zeros_like(mean))


def with_refinement_error(gap: Estimate, left, scale: float) -> Estimate:
    """An approximation gap whose standard error includes how far the factors found may be from the best ones.

    Args:
        gap: the gap, with the standard error over its draws.
        left: how much the rows may still gain, with ``rows`` and ``rows_se [N]``.
        scale: the scale of the rows in the total.
    """
    lack, error = left.rows.nan_to_num(nan=torch.inf), left.rows_se.nan_to_num(nan=torch.inf)
    rows = lack.clamp(min=0.0) + error
    total = scale * (lack.sum().clamp(min=0.0) + error.norm()).item()
    return replace(gap, se=math.hypot(gap.se, total), rows_se=torch.hypot(cast(Tensor, gap.rows_se), rows))


def _estimate(rows: Tensor, influence: Tensor, scale: float, variance: Tensor) -> Estimate:
    """An estimate with its error: of the influence ``[S, N]`` of each draw, and an independent ``variance [N]``."""
    # A draw and its mirror image are dependent, and count as one.
    pairs = influence.unflatten(0, (-1, 2)).mean(1)
    return Estimate(
        value=scale * rows.sum().item(),
        se=scale * (pairs.sum(1).var() / len(pairs) + variance.sum()).sqrt().item(),
        rows=rows,
        rows_se=(pairs.var(0) / len(pairs) + variance).sqrt(),
        scale=scale,
    )


def exact_evidence(model: Callable, args: tuple, given: Tensor | None, count: int) -> Tensor | None:
    """``[N]`` the exact log evidences, as given or from the model; ``None`` if neither has them."""
    if given is None and isinstance(model, HasEvidence):
        with torch.no_grad():
            given = model.log_evidence(*args)
    if given is None:
        return None
    given = torch.as_tensor(given).detach()
    if count == 1:
        # Rows that are tied have one evidence together.
        given = given.reshape(-1)
    if given.shape != (count,) or not given.isfinite().all():
        raise ValueError(
            f"Expected a finite log evidence for each of the {count} rows, got shape {tuple(given.shape)}"
            f"{'' if given.isfinite().all() else ' with values that are no numbers'}."
        )
    return given.double()
