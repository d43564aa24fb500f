"""A tuning cell of the sweep `images`: the trials of one guide, one for each pair of learning rates of the grid."""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

import pyro_avi as avi
from experiments.image_model import build, load, optimization
from experiments.image_training import CURVE_DRAWS, all_finite, bound, draws_of_its_own
from experiments.run import Context

__all__ = ["tune_cell"]


def tune_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train a guide at every pair of learning rates; return the training bound of each, and what all cost.

    Each is trained as if it were the only one, never all by one graph (`pyro_avi.fit_many`): sums are rounded differently
    there, and whether that is faster depends on the machine, of which a cell's numbers are to know nothing.
    """
    train, _ = load(settings, context)
    steps, grid = settings["steps"], settings["grid"]
    outcomes, train_seconds, evaluation_seconds = [], 0.0, 0.0
    for place, (local, rest) in enumerate(grid):
        started = time.perf_counter()
        trial = {**settings, "lr_local": local, "lr_global": rest}
        model, guide = build(trial, train)
        diverged_at = _train(model, guide, trial, train, partial(_tell, context, place * steps, len(grid) * steps))
        trained = time.perf_counter()
        outcomes.append(_outcome(model, guide, trial, train, diverged_at))
        train_seconds += trained - started
        evaluation_seconds += time.perf_counter() - trained
    return {"trials": outcomes, "train_seconds": train_seconds, "evaluation_seconds": evaluation_seconds}


def _train(model, guide, trial: Mapping[str, Any], train: Tensor, tell) -> int | None:
    """The step at which it diverged, or None."""
    try:
        avi.fit(
            model,
            guide,
            batches=avi.minibatches(train, batch_size=trial["batch_size"], seed=trial["seed"]),
            num_steps=trial["steps"],
            elbo=TraceMeanField_ELBO(),
            compile=trial["compile"],
            seed=trial["seed"],
            progress=False,
            callbacks=[tell],
            **optimization(trial),
        )
    except avi.DivergedError as error:
        return error.step
    return None


def _tell(context: Context, before: int, total: int, course: avi.Fit) -> None:
    done = before + course.steps
    if done % 20 == 0 or done == total:
        context.progress(done, total, "")


def _outcome(model, guide, trial: Mapping[str, Any], train: Tensor, diverged_at: int | None) -> dict[str, Any]:
    if diverged_at is None and not all_finite(model, guide):
        diverged_at = trial["steps"]
    elbo, error = None, None
    if diverged_at is None:
        with draws_of_its_own(train.device, 0):
            elbo, error = bound(model, guide, train, num_samples=CURVE_DRAWS)
    rates = {name: trial[name] for name in ("lr_local", "lr_global")}
    return {**rates, "diverged_at": diverged_at, "elbo": elbo, "elbo_se": error}
