"""A tuning cell of the sweep `images`: the trials of one guide, one for each pair of learning rates of the grid."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import pyro_avi as avi
from experiments.runner.run_cell import Context, Progress
from experiments.sweeps.images.cells import best_of
from experiments.sweeps.images.evaluation import CURVE_DRAWS, TOLD_EVERY, all_finite, bound, draws_of_its_own
from experiments.sweeps.images.model import build, fit_cell, load
from experiments.sweeps.images.rounds import Rounds

__all__ = ["next_pair", "tune_cell"]


def tune_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train a guide at every pair of learning rates; return the training bound of each, and what all cost.

    The pairs are those of the grid, smaller rates where one of them diverges, and while the best of all that were tried lies
    on an edge of them, the next one beyond that edge. Each is trained as if it were the only one, never all by one graph
    (`pyro_avi.fit_many`): sums are rounded differently there, and whether that is faster depends on the machine, of which
    a cell's numbers are to know nothing.
    """
    train, _ = load(settings, context)
    pairs, tried = [tuple(pair) for pair in settings["grid"]], []
    while len(tried) < len(pairs):
        name = f"trial{len(tried)}"
        trial = {**settings, "lr_local": pairs[len(tried)][0], "lr_global": pairs[len(tried)][1]}
        told = _Told(context.progress, len(tried) * settings["steps"], len(pairs) * settings["steps"])
        tried.append(context.scratch.once(name, partial(_try, trial, train, told, context.scratch.checkpoint(name))))
        if len(tried) == len(pairs):
            pairs += next_pair([each["outcome"] for each in tried], settings["grid"], settings["ladder"])
    sums = {name: sum(each[name] for each in tried) for name in ("train_seconds", "evaluation_seconds")}
    return {"trials": [each["outcome"] for each in tried], **sums}


def next_pair(
    trials: Sequence[Mapping[str, Any]], grid: Sequence[Sequence[float]], ladder: Sequence[float]
) -> list[tuple[float, float]]:
    """The pair of rates to try next; none where the best lies inside what was tried.

    First, in place of a pair of the grid that diverged, the next smaller local rate; then, where the best of all trials is
    on an edge of them, the next rate beyond.

    Args:
        trials: with ``lr_local``, ``lr_global`` and ``elbo``, which is ``None`` where a trial diverged.
        grid: the pairs that were to be tried.
        ladder: all rates that may be tried, increasing.

    Example:
        >>> tried = [{"lr_local": a, "lr_global": b, "elbo": a} for a in (0.01, 0.1) for b in (0.01, 0.1, 1)]
        >>> next_pair(tried, [], (0.001, 0.01, 0.1, 1)), next_pair(tried, [], (0.001, 0.01, 0.1))
        ([(1, 0.01)], [(0.1, 0.001)])
        >>> tried[0]["elbo"] = None
        >>> next_pair(tried, [(0.01, 0.01)], (0.001, 0.01, 0.1, 1))
        [(0.001, 0.01)]
    """
    bounds = {(trial["lr_local"], trial["lr_global"]): trial["elbo"] for trial in trials}
    for local, rest in grid:
        for smaller in (rate for rate in reversed(ladder) if rate < local):
            if bounds[local, rest] is not None:
                break
            if (smaller, rest) not in bounds:
                return [(smaller, rest)]
            local = smaller
    best = best_of(trials)
    pair = {name: best[name] for name in ("lr_local", "lr_global")}
    for name, rate in pair.items():
        rates = {trial[name] for trial in trials}
        higher, lower = [r for r in ladder if r > max(rates)], [r for r in ladder if r < min(rates)]
        if rate == max(rates) and higher:
            return [tuple((pair | {name: higher[0]}).values())]
        if rate == min(rates) and lower:
            return [tuple((pair | {name: lower[-1]}).values())]
    return []


@dataclass
class _Told:
    """Tells the steps of a trial as those of a cell, and keeps the fit, for one that diverges returns none."""

    progress: Progress
    before: int
    total: int
    fit: avi.Fit | None = None

    def __call__(self, fit: avi.Fit) -> None:
        self.fit, done = fit, self.before + fit.steps
        if done % TOLD_EVERY == 0 or done == self.total:
            self.progress(done, self.total, "")

    def next_call(self, steps: int) -> int:
        """After how many steps in all there is something to tell; the fit is kept from the first step on."""
        return steps + TOLD_EVERY - (self.before + steps) % TOLD_EVERY if self.fit is not None else steps + 1


def _try(trial: Mapping[str, Any], train: Tensor, told: _Told, checkpoint: Path | None) -> dict[str, Any]:
    """A trial: its rates and its bound, and the seconds of its steps and of what was evaluated."""
    model, guide = build(trial, train)
    diverged_at = None
    try:
        told.fit = fit_cell(model, guide, train, trial, Rounds((trial["steps"],)), told, checkpoint)
    except avi.DivergedError as error:
        diverged_at = error.step
    started = time.perf_counter()
    outcome = _outcome(model, guide, trial, train, diverged_at)
    return {
        "outcome": outcome,
        # One that diverges at its first step has no fit.
        "train_seconds": 0.0 if told.fit is None else told.fit.seconds,
        "evaluation_seconds": time.perf_counter() - started,
    }


def _outcome(model, guide, trial: Mapping[str, Any], train: Tensor, diverged_at: int | None) -> dict[str, Any]:
    if diverged_at is None and not all_finite(model, guide):
        diverged_at = trial["steps"]
    elbo, error = None, None
    if diverged_at is None:
        with draws_of_its_own(train.device, 0):
            elbo, error = bound(model, guide, train, num_samples=CURVE_DRAWS)
    rates = {name: trial[name] for name in ("lr_local", "lr_global")}
    return {**rates, "diverged_at": diverged_at, "elbo": elbo, "elbo_se": error}
