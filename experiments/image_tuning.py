"""A tuning cell of the sweep `images`: the trials of one guide, one for each pair of learning rates of the grid."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

import pyro_avi as avi
from experiments.image_model import build, load, optimization
from experiments.image_training import CURVE_DRAWS, all_finite, bound, draws_of_its_own
from experiments.run import Context

__all__ = ["tune_cell"]

# Steps that are timed to find out how the trials are trained.
_TIMED_STEPS = 30


def tune_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train a guide at every pair of learning rates; return the training bound of each, and what all cost.

    Compiled trials are trained by one graph where a step of it is measured to take less than theirs take together. Sums
    are rounded differently there, so that the bounds of two machines may differ in their last digits.
    """
    train, _ = load(settings, context)
    started = time.perf_counter()
    trials = [{**settings, "lr_local": local, "lr_global": rest} for local, rest in settings["grid"]]
    at_once = None if settings["compile"] is False else _measure(trials, train)
    replicas = [build(trial, train) for trial in trials]
    if at_once is not None and at_once["chosen"]:
        diverged = _train_at_once(replicas, trials, train, context)
    else:
        diverged = [
            _train_alone(
                replica, trial, train, _Told(context, before=i * trial["steps"], total=len(trials) * trial["steps"])
            )
            for i, (replica, trial) in enumerate(zip(replicas, trials, strict=True))
        ]
    trained = time.perf_counter()
    outcomes = [
        _outcome(*replica, trial, train, step) for replica, trial, step in zip(replicas, trials, diverged, strict=True)
    ]
    return {
        "trials": outcomes,
        "at_once": at_once,
        "train_seconds": trained - started,
        "evaluation_seconds": time.perf_counter() - trained,
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


def _measure(trials: Sequence[Mapping[str, Any]], train: Tensor) -> dict[str, Any] | None:
    """Time steps of one trial and of all at once, on models of their own; whether to train all at once.

    The latter are not compiled where all steps of all trials together take less than compiling one does. None where steps
    are taken eagerly.
    """
    one, every = _Timed(), _Timed()
    # Of a training that diverges a step takes as long.
    with suppress(avi.DivergedError):
        _fit(build(trials[0], train), trials[0], train, one)
    if not one.compile_seconds:
        return None
    one_by_one, at_once = len(trials) * one.seconds, None
    if one_by_one * trials[0]["steps"] > one.compile_seconds:
        with suppress(avi.DivergedError):
            _fit_many([build(trial, train) for trial in trials], trials, train, every)
        at_once = every.seconds
    return {
        "one_by_one_step_seconds": one_by_one,
        "at_once_step_seconds": at_once,
        "chosen": at_once is not None and at_once < one_by_one,
    }


def _train_alone(replica, trial: Mapping[str, Any], train: Tensor, told: Callable) -> int | None:
    """The step at which it diverged, or None."""
    try:
        _fit(replica, trial, train, told)
    except avi.DivergedError as error:
        return error.step
    return None


def _train_at_once(replicas, trials: Sequence[Mapping[str, Any]], train: Tensor, context: Context) -> list[int | None]:
    """The step at which each diverged, or None."""
    told = _Told(context, before=0, total=trials[0]["steps"])
    try:
        courses = _fit_many(replicas, trials, train, told)
    except avi.DivergedError:
        courses = told.course
    return [course.diverged_at for course in courses]


def _fit(replica, trial: Mapping[str, Any], train: Tensor, told: Callable) -> avi.Fit:
    model, guide = replica
    return avi.fit(
        model,
        guide,
        batches=_batches(trial, train),
        compile=trial["compile"],
        **optimization(trial),
        **_common(trial, told),
    )


def _fit_many(replicas, trials: Sequence[Mapping[str, Any]], train: Tensor, told: Callable) -> list[avi.Fit]:
    # All have the same batches, and by the same tensors.
    batches = itertools.tee(_batches(trials[0], train), len(trials))
    rates = [optimization(trial)["lr"] for trial in trials]
    return avi.fit_many(replicas, batches=batches, lr=rates, **_common(trials[0], told))


def _batches(trial: Mapping[str, Any], train: Tensor):
    return avi.minibatches(train, batch_size=trial["batch_size"], seed=trial["seed"])


def _common(trial: Mapping[str, Any], told: Callable) -> dict[str, Any]:
    steps, seed = trial["steps"], trial["seed"]
    return {"num_steps": steps, "elbo": TraceMeanField_ELBO(), "seed": seed, "progress": False, "callbacks": [told]}


class _Timed:
    """A callback that ends a training after some compiled steps, and knows what compiling and the median step took."""

    def __init__(self) -> None:
        self._seconds = [0.0]
        self.compile_seconds = 0.0

    def __call__(self, course: avi.Fit | list[avi.Fit]) -> bool:
        first = course[0] if isinstance(course, list) else course
        self.compile_seconds = first.compile_seconds
        self._seconds.append(first.seconds - first.compile_seconds)
        return len(self._seconds) > _TIMED_STEPS or not self.compile_seconds

    @property
    def seconds(self) -> float:
        return statistics.median(after - before for before, after in itertools.pairwise(self._seconds))


class _Told:
    """A callback that passes on the progress of a training, or of several at once, and keeps its course."""

    def __init__(self, context: Context, *, before: int, total: int) -> None:
        self._progress, self._before, self._total = context.progress, before, total
        self.course: Any = None

    def __call__(self, course: avi.Fit | list[avi.Fit]) -> None:
        self.course = course
        done = self._before + (course[0] if isinstance(course, list) else course).steps
        if done % 20 == 0 or done == self._total:
            self._progress(done, self._total, "")
