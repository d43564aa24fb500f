"""One cell of the sweep `images`: build model and guide, train, measure."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyro_avi as avi
from experiments.runner.run_cell import Context
from experiments.sweeps.images.evaluation import (
    Watch,
    all_finite,
    count_parameters,
    draws_of_its_own,
    finite,
    measure_final,
    mse,
    of_training_rows,
)
from experiments.sweeps.images.model import as_factorized, build, fit_cell, load

__all__ = ["train_cell"]

# Shares of the tuned learning rates, one after the other where a training diverges.
_ATTEMPTS = (1.0, 0.3, 0.1)


def train_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one guide as the settings say; return the curve, the final bounds and errors, and what they cost."""
    train, test = load(settings, context)
    seconds, attempts = 0.0, []
    for attempt, rates in enumerate(_falling(settings)):
        tried = settings | rates
        model, guide = build(tried, train)
        watch = Watch(model, guide, train, test, tried, context.progress, began=seconds)
        seconds, diverged_at = _train(watch, context.scratch.checkpoint(f"attempt{attempt}"))
        attempts.append(rates | {"diverged_at": diverged_at})
        if diverged_at is None:
            break
    started = time.perf_counter()
    result = {
        "status": "done" if diverged_at is None else "diverged",
        "diverged_at": diverged_at,
        "attempts": attempts,
        "curve": watch.curve,
        "convergence": watch.convergence(),
        "final": None,
        "refined": None,
        "continued": None,
        "parameters": count_parameters(model, guide),
        "noise_scale": finite(model.likelihood.scale.item()),
        "train_seconds": seconds,
        "mean_image_mse": {part: mse(train.mean(0), rows) for part, rows in (("train", train), ("test", test))},
        "images": None,
    }
    if diverged_at is None:
        result |= measure_final(watch, settings)
    result["evaluation_seconds"] = watch.seconds + time.perf_counter() - started
    if diverged_at is None and settings.get("continued"):
        result["continued"] = _continue(watch, result["final"]["train"], context.scratch.checkpoint("continued"))
    return result


def _falling(settings: Mapping[str, Any]) -> list[dict[str, float]]:
    """The learning rates to train with, and those to start again with where that diverges.

    Rates are tuned by trainings shorter than this one: the best of them may be too large for the whole way.
    """
    rates = {name: settings[name] for name in ("lr_local", "lr_global")}
    if settings["protocol"] == "published":
        return [rates]
    return [{name: float(f"{rate * share:.3g}") for name, rate in rates.items()} for share in _ATTEMPTS]


def _train(watch: Watch, checkpoint: Path | None) -> tuple[float, int | None]:
    """Train what is watched; the seconds since the first attempt, and the step at which it diverged or None.

    A round that loses a good part of what was gained is a divergence as well: at larger rates numbers stay finite and the
    bound goes down by thousands of nats.
    """
    settings = watch.settings
    watch.measure(0, 0.0)
    try:
        fit = fit_cell(watch.model, watch.guide, watch.train, settings, watch.rounds, watch, checkpoint)
    except avi.DivergedError as error:
        return watch.curve["seconds"][-1], error.step
    well = all_finite(watch.model, watch.guide) and not watch.fell
    return watch.began + fit.seconds, None if well else fit.steps


def _continue(watch: Watch, before: Mapping[str, Any], checkpoint: Path | None) -> dict[str, Any]:
    """Go on as F-VI, from the encoder's outputs and with the globals and the model as they are.

    F-VI contains what the amortized guide has come to, draw for draw, so its bound is that one's where steps gain nothing.
    """
    settings = watch.settings | watch.settings["continued"]
    table = as_factorized(watch.guide, watch.model, watch.train)
    free = Watch(watch.model, table, watch.train, watch.test, settings, watch.progress)
    free.before = watch.convergence()["rise"]
    seconds, diverged_at = _train(free, checkpoint)
    final = dict(before)
    if diverged_at is None:
        with draws_of_its_own(watch.train.device, settings["steps"] + 1):
            after = of_training_rows(watch.model, table, watch.train)
        if after["elbo"] is not None and after["elbo"] > before["elbo"]:
            final = after
    return {
        "status": "done" if diverged_at is None else "diverged",
        "diverged_at": diverged_at,
        "curve": free.curve,
        "convergence": free.convergence(),
        "final": {"train": final},
        "train_seconds": seconds,
        "evaluation_seconds": free.seconds,
    }
