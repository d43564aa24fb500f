"""The cells of the sweep `gradients`: its options, and what decides each run."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["CONTINUOUS", "DISCRETE", "add_arguments", "best_rate", "count", "describe", "estimate", "plan", "summary"]

summary = "the variance of gradient estimators, and what it costs in training"

_KINDS = ("normal", "coin", "linear", "training")
#: What continuous and what binary latents are trained by.
CONTINUOUS = ("pathwise", "sticking_the_landing", "closed_form_kl", "score_function", "decaying_baseline", "learned_baseline",
              "leave_one_out")  # fmt: skip
DISCRETE = ("score_function", "decaying_baseline", "learned_baseline", "leave_one_out", "vimco", "enumeration",
            "gumbel_softmax", "straight_through")  # fmt: skip
_LATENTS = {"continuous": CONTINUOUS, "binary": DISCRETE}
# By preset: draws in closed forms and of the linear model, data set of the training, its length in steps or in seconds of the
# processor, its latents, and the learning rates: one for all, or those that each estimator is tried at.
_MNIST = {"dataset": "mnist", "latent_dim": 8, "widths": [200, 200], "batch_size": 100, "rates": [3e-4, 1e-3, 3e-3]}
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"rows": 2_000, "draws": 20, "dataset": "digits", "length": {"steps": 300}, "latent_dim": 8, "widths": [64],
              "batch_size": 64, "rates": [3e-3]},
    "mnist": {"rows": 2_000, "draws": 20, "length": {"seconds": 40}, **_MNIST},
    "paper": {"rows": 10_000, "draws": 100, "length": {"steps": 20_000}, **_MNIST},
}  # fmt: skip
# A trial takes this share of a training, by a seed of its own. While the best rate lies on the edge of those tried, the next
# of the ladder is tried.
_TRIAL_SHARE, _TRIAL_SEED = 5, 20_000
_LADDER = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument(
        "--preset", choices=sorted(_PRESETS), default="quick", help="the number of draws, rows and steps"
    )
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS), help="what to measure")
    parser.add_argument("--dataset", choices=("digits", "mnist", "fashionmnist"), help="of the training")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of a training")
    length.add_argument("--seconds", type=float, help="of the processor that a training takes, in place of --steps")
    parser.add_argument(
        "--rates", nargs="+", type=float, help="learning rates that each estimator is tried at; one for all"
    )
    parser.add_argument("--latents", nargs="+", choices=list(_LATENTS), default=list(_LATENTS), help="what to train")
    every = list(dict.fromkeys((*CONTINUOUS, *DISCRETE)))
    parser.add_argument("--estimators", nargs="+", choices=every, default=every, help="what to train by")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the trainings")


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """The cells that can be named now: where rates are tried, the trainings of an estimator follow from the record of that."""
    preset = _settled(options)
    sizes = {"rows": preset["rows"], "draws": preset["draws"], "seed": 0}
    every = [*_closed_forms(sizes), *_linear(preset), *_trainings(options, preset, records)]
    cells = [Cell("gradients", settings) for settings in every]
    return [cell for cell in cells if _kind(cell) in options.kinds]


def _kind(cell: Cell) -> str:
    kind = cell.settings["kind"]
    return "training" if kind == "trials" else kind


def _settled(options: argparse.Namespace) -> dict[str, Any]:
    """The preset, with the options that are given in its place."""
    if options.steps is not None and options.steps < 20:
        raise ValueError(f"Expected --steps of at least 20, got {options.steps}.")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"Expected --seconds above 0, got {options.seconds}.")
    preset = dict(_PRESETS[options.preset])
    if options.steps is not None:
        preset["length"] = {"steps": options.steps}
    if options.seconds is not None:
        preset["length"] = {"seconds": options.seconds}
    if options.rates is not None and not min(options.rates) > 0:
        raise ValueError(f"Expected --rates above 0, got {options.rates}.")
    given = {name: getattr(options, name) for name in ("dataset", "rates")}
    preset |= {name: value for name, value in given.items() if value is not None}
    return preset


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


def _trainings(options: argparse.Namespace, preset: Mapping, records: Mapping[str, Record]) -> Iterator[dict]:
    base = {name: preset[name] for name in ("dataset", "latent_dim", "widths", "batch_size")} | {"num_particles": 4}
    # Records from before began at biases of zero.
    base["start"] = "mean image"
    rates: list[tuple[dict, float]] = []
    for own in _estimators(options):
        if len(preset["rates"]) == 1:
            rates.append((own, preset["rates"][0]))
            continue
        short = {name: max(value // _TRIAL_SHARE, 20) if name == "steps" else value / _TRIAL_SHARE
                 for name, value in preset["length"].items()}  # fmt: skip
        tried = {"rates": preset["rates"], "ladder": _LADDER, "seed": _TRIAL_SEED}
        trials = {"kind": "trials", **base, **own, **short, **tried}
        yield trials
        record = records.get(Cell("gradients", trials).key)
        if record is not None:
            rates.append((own, best_rate(record["result"]["trials"])))
    # Seed by seed: a machine that gets slower does so for all estimators alike.
    for seed in options.seeds:
        for own, lr in rates:
            yield {"kind": "training", **base, **own, **preset["length"], "lr": lr, "seed": seed}


def _estimators(options: argparse.Namespace) -> list[dict[str, str]]:
    return [
        {"latents": latents, "estimator": estimator}
        for latents, estimators in _LATENTS.items()
        for estimator in estimators
        if latents in options.latents and estimator in options.estimators
    ]


def best_rate(trials: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of the best bound; the least of all where every trial diverged.

    Args:
        trials: with ``lr`` and ``elbo``, which is ``None`` where it diverged.
    """
    finite = [trial for trial in trials if trial["elbo"] is not None]
    if not finite:
        return min(trial["lr"] for trial in trials)
    return max(finite, key=lambda trial: trial["elbo"])["lr"]


def count(options: argparse.Namespace) -> int:
    """The number of cells of all stages."""
    preset = _settled(options)
    trained = len(_estimators(options)) * (len(options.seeds) + (len(preset["rates"]) > 1))
    return sum(_kind(cell) != "training" for cell in plan(options, {})) + trained * ("training" in options.kinds)


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    if s["kind"] == "normal":
        return f"normal, D = {s['dim']}, mean {s['mu']}"
    if s["kind"] == "coin":
        return f"coin, p = {s['p']}"
    if s["kind"] == "linear":
        return f"linear model, {s['latent_dim']} latents, {s['num_rows']} rows, {s['off']} from the optimum"
    what = "learning rates" if s["kind"] == "trials" else f"seed {s['seed']}"
    return f"{s['dataset']}, {s['latents']} latents, {s['estimator']}, {what}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    if s["kind"] in ("training", "trials"):
        step = 0.006 if s["dataset"] == "digits" else 0.012
        if s["estimator"] == "enumeration":
            # All values of a row, of which the others take four draws or one.
            step *= 2 ** s["latent_dim"] / 4
        taken = s["seconds"] if "seconds" in s else s["steps"] * step
        return 10 + taken * len(s.get("rates", [0]))
    return 10 + 0.03 * s["draws"]
