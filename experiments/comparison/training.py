"""The work of a cell: one guide of a problem, trained with every learning rate and seed at once."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import pyro
import torch

import pyro_avi as avi
from experiments.runner.run_cell import Context

__all__ = ["Problem", "train"]

#: How often a bound is looked at, evenly on a logarithmic scale of steps.
LOOKS = 40


class Problem(Protocol):
    """A model with exact bounds.

    Attributes:
        model: of all replicas; it has no parameters of its own.
        x: the data.
        best: the largest bound that any factors of the family have, in nats for all rows.
        evidence: their log probability.
        spread: the standard deviation of the log weight of all rows at the best factors.
    """

    model: Callable
    x: torch.Tensor
    best: float
    evidence: float
    spread: float

    def guide(self, arm: str) -> Any:
        """The guide of an arm."""

    def bound(self, guide: Any) -> float:
        """The exact ELBO of a guide, in nats for all rows."""

    def predicted(self, arm: str) -> float | None:
        """The closed form of what the arm loses of the best bound, where there is one."""


def train(problem: Problem, settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train an arm by both protocols and follow its exact bounds.

    By the published one the learning rate is as published and constant; by the fair one each of the rates falls to zero by a
    cosine.
    """
    arm, steps, seeds = settings["arm"], settings["steps"], settings["seeds"]
    runs = [("published", settings["published_rate"], seed) for seed in seeds]
    runs += [("fair", rate, seed) for rate in settings["rates"] for seed in seeds]
    pyro.clear_param_store()
    guides = []
    for _, _, seed in runs:
        torch.manual_seed(seed)
        guides.append(problem.guide(arm).setup(problem.x))
    looks = np.unique(np.geomspace(1, steps, LOOKS).round().astype(int)).tolist()
    bounds: list[list[float]] = []
    # Processor time of one thread: what else the machine does is no part of it, nor are the looks themselves.
    seconds: list[float] = []
    paused = 0.0

    def look(fits: list) -> None:
        nonlocal paused
        if fits[0].steps in looks:
            now = time.process_time()
            seconds.append(now - paused)
            # One that has diverged has no bound, and is no reason to stop the others.
            with pyro.validation_enabled(False):
                bounds.append([problem.bound(guide) for guide in guides])
            context.progress(fits[0].steps, steps, f"gap {problem.best - max(bounds[-1]):.3g}")
            paused += time.process_time() - now

    draws = settings["draws"]
    avi.fit_many(
        [(problem.model, guide) for guide in guides],
        problem.x,
        num_steps=steps,
        lr=[rate if protocol == "published" else _falling(rate, steps) for protocol, rate, _ in runs],
        seed=[seed for _, _, seed in runs],
        # Of its gradient only that part is noise which the factors do not explain: a draw does for many.
        elbo=avi.StickingTheLandingELBO(draws, vectorize_particles=draws > 1, max_plate_nesting=1),
        callbacks=[look],
        progress=False,
    )
    return {
        "best": problem.best,
        "evidence": problem.evidence,
        "spread": problem.spread,
        "predicted_loss": problem.predicted(arm),
        "looks": looks,
        # From the end of the first step; the graph takes all steps together, of which each replica has an equal part.
        "seconds": [(each - seconds[0]) / len(runs) for each in seconds],
        "runs": [
            {"protocol": protocol, "rate": rate, "seed": seed, "bounds": [_number(each[at]) for each in bounds]}
            for at, (protocol, rate, seed) in enumerate(runs)
        ],
    }


def _falling(rate: float, steps: int) -> Callable[[int], float]:
    return lambda step: 0.5 * rate * (1 + math.cos(math.pi * step / steps))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
