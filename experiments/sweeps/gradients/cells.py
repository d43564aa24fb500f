"""The cells of the sweep `gradients`: its options, and what decides each run."""

import argparse
from collections.abc import Iterator, Mapping

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["CONTINUOUS", "DISCRETE", "add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "the variance of gradient estimators, and what it costs in training"

_KINDS = ("normal", "coin", "linear", "training")
#: What continuous and what binary latents are trained by.
CONTINUOUS = ("pathwise", "sticking_the_landing", "closed_form_kl", "score_function", "decaying_baseline", "learned_baseline",
              "leave_one_out")  # fmt: skip
DISCRETE = ("score_function", "decaying_baseline", "learned_baseline", "leave_one_out", "vimco", "enumeration",
            "gumbel_softmax", "straight_through")  # fmt: skip
# By preset: draws in closed forms and of the linear model, data set of the training, its steps and latents.
_PRESETS = {
    "quick": {"rows": 2_000, "draws": 20, "dataset": "digits", "steps": 300, "latent_dim": 8, "widths": [64], "batch_size": 64},
    "paper": {"rows": 10_000, "draws": 100, "dataset": "mnist", "steps": 20_000, "latent_dim": 8, "widths": [200, 200],
              "batch_size": 100},
}  # fmt: skip
# Learning rates, the same for all: of the guide's and the model's parameters.
_LR = 3e-3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument(
        "--preset", choices=sorted(_PRESETS), default="quick", help="the number of draws, rows and steps"
    )
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS), help="what to measure")
    parser.add_argument("--dataset", choices=("digits", "mnist", "fashionmnist"), help="of the training")
    parser.add_argument("--steps", type=int, help="of a training")
    every = list(dict.fromkeys((*CONTINUOUS, *DISCRETE)))
    parser.add_argument("--estimators", nargs="+", choices=every, default=every, help="what to train by")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings")


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    if options.steps is not None and options.steps < 20:
        raise ValueError(f"Expected --steps of at least 20, got {options.steps}.")
    preset = _PRESETS[options.preset]
    sizes = {"rows": preset["rows"], "draws": preset["draws"], "seed": 0}
    every = [*_closed_forms(sizes), *_linear(preset), *_trainings(options, preset)]
    return [Cell("gradients", settings) for settings in every if settings["kind"] in options.kinds]


def _closed_forms(sizes: dict) -> Iterator[dict]:
    for dim in (1, 2, 4, 8, 16, 32):
        yield {"kind": "normal", "mu": 0.0, "dim": dim, **sizes}
    for mu in (0.5, 1.0, 2.0, 4.0):
        yield {"kind": "normal", "mu": mu, "dim": 1, **sizes}
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        yield {"kind": "coin", "p": p, "high": 2.0, "low": 0.3, **sizes}


def _linear(preset: Mapping) -> Iterator[dict]:
    base = {"kind": "linear", "latent_dim": 2, "num_rows": 50, "off": 0.0, "draws": 2 * preset["draws"], "seed": 0}
    # Distance from the optimum in posterior standard deviations; latents; rows.
    for change in ({"off": 0.0}, {"off": 0.3}, {"off": 1.0}, {"off": 3.0}):
        yield base | change
    for latent_dim in (4, 8, 16):
        yield base | {"off": 1.0, "latent_dim": latent_dim}
    for num_rows in (10, 200, 1000):
        yield base | {"off": 1.0, "num_rows": num_rows}


def _trainings(options: argparse.Namespace, preset: Mapping) -> Iterator[dict]:
    for latents, estimators in (("continuous", CONTINUOUS), ("binary", DISCRETE)):
        for estimator in (each for each in estimators if each in options.estimators):
            for seed in options.seeds:
                yield {
                    "kind": "training",
                    "dataset": options.dataset or preset["dataset"],
                    "latents": latents,
                    "estimator": estimator,
                    "latent_dim": preset["latent_dim"],
                    "widths": preset["widths"],
                    "batch_size": preset["batch_size"],
                    "steps": options.steps or preset["steps"],
                    "lr": _LR,
                    "num_particles": 4,
                    "seed": seed,
                }


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    if s["kind"] == "normal":
        return f"normal, D = {s['dim']}, mean {s['mu']}"
    if s["kind"] == "coin":
        return f"coin, p = {s['p']}"
    if s["kind"] == "linear":
        return f"linear model, {s['latent_dim']} latents, {s['num_rows']} rows, {s['off']} from the optimum"
    return f"{s['dataset']}, {s['latents']} latents, {s['estimator']}, seed {s['seed']}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    if s["kind"] == "training":
        return 10 + s["steps"] * (0.012 if s["dataset"] != "digits" else 0.006)
    return 10 + 0.03 * s["draws"]
