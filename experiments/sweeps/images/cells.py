"""The cells of the sweep `images`: its options, and what decides each run."""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from experiments import datasets
from experiments.runner.cell import Cell
from experiments.runner.record import Record
from experiments.sweeps.images.rounds import SHARE

__all__ = ["add_arguments", "best_of", "count", "describe", "estimate", "plan", "summary"]

summary = "constant, amortized and factorized guides of a Bayesian decoder on images; gaps, errors, times"

_GUIDES = ("constant", "amortized", "factorized")
_PROTOCOLS = ("published", "fair")

_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "dataset": ["digits"],
        "num_train": 1280,
        "widths": [16, 64],
        "seeds": [0, 1],
        "steps": 80_000,
        "batch_size": 256,
        "latent_dim": 4,
        "hidden_dim": 32,
        "noise": ["learned"],
        "protocol": ["fair"],
        "compile": "auto",
    },
    "paper": {
        "dataset": ["mnist"],
        "num_train": 10_000,
        "widths": [1, 64, 128, 256],
        "seeds": [1954, *range(1789, 1798)],
        "steps": 50_000,
        "batch_size": 1000,
        "latent_dim": 64,
        "hidden_dim": 256,
        "noise": ["fixed"],
        "protocol": ["published"],
        "compile": "auto",
    },
}

_PUBLISHED_LR = 1e-3
# The fair protocol: every guide is tried at each pair of a grid, and beyond it while the best lies on its edge, each time for
# a sixteenth of the most steps, the first round of a training.
_GRID = tuple(itertools.product((1e-2, 1e-1), (1e-3, 1e-2)))
_LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
_TUNING_SHARE, _TUNING_SEED = 16, 20_000
# Seconds: of a small step, of compiling it where nothing is cached, and of what is measured of a cell.
_EAGER_STEP, _COMPILED_STEP, _COMPILING, _MEASURING = 0.004, 0.0003, 10.0, 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep; those left out are the preset's."""
    add = parser.add_argument
    add("--preset", choices=sorted(_PRESETS), default="quick", help="settings of everything that is not given")
    add("--dataset", nargs="+", metavar="NAME", help=f"one or more of {', '.join(datasets.names())}")
    add("--num-train", type=int, metavar="N", help="a seeded subset of N training images; 0 for all")
    add("--guides", nargs="+", choices=_GUIDES, help="the guides to compare (default: all)")
    add("--widths", nargs="+", type=int, metavar="K", help="units a layer of the amortized guides' encoders")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="of initial values, minibatches and draws")
    add("--steps", type=int, help="training steps of a cell")
    add("--batch-size", type=int, metavar="B", help="rows of a minibatch")
    add("--noise", nargs="+", choices=("fixed", "learned"), help="the scale of the pixels' noise: 1, or learned")
    add("--architecture", choices=("dense", "conv"), default="dense", help="of decoder and encoders")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the training step, or do not (default: where a count of operations says that it pays)",
    )
    add("--protocol", nargs="+", choices=_PROTOCOLS, help="one learning rate for all, or tuned for every guide")


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """The cells that can be named now: a fair cell follows from the record of its guide's tuning."""
    cells = []
    for group in _groups(options):
        if group["protocol"] == "published":
            cells += _results(options, group, (_PUBLISHED_LR, _PUBLISHED_LR))
            continue
        tuning = _tuning_cell(group)
        cells.append(tuning)
        chosen, follows = _best(tuning, records), {"share": SHARE, "continued": None}
        if _continues(options, group):
            # The widest encoder's cell goes on as F-VI, so it waits for the rates of both.
            rates = _best(_tuning_cell(group | {"guide": "factorized", "width": None}), records)
            chosen, follows["continued"] = rates and chosen, rates and _named(rates)
        if chosen is not None:
            cells += _results(options, group | follows, chosen)
    return cells


def _results(options: argparse.Namespace, group: Mapping[str, Any], rates: tuple[float, float]) -> list[Cell]:
    return [_cell(group, "result", seed=seed, **_named(rates)) for seed in _settled(options)["seeds"]]


def _named(rates: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("lr_local", "lr_global"), rates, strict=True))


def _continues(options: argparse.Namespace, group: Mapping[str, Any]) -> bool:
    settled = _settled(options)
    return group["width"] == max(settled["widths"]) and "factorized" in settled["guides"]


def count(options: argparse.Namespace) -> int:
    """The number of cells of all stages."""
    seeds = len(_settled(options)["seeds"])
    return sum(seeds + (group["protocol"] == "fair") for group in _groups(options))


def describe(cell: Cell) -> str:
    """A short label: what sets the cell apart."""
    s = cell.settings
    guide = f"amortized k={s['width']}" if s["guide"] == "amortized" else s["guide"]
    what = "learning rates" if s["purpose"] == "tuning" else f"seed {s['seed']}"
    return f"{s['dataset']} {s['noise']} noise, {s['protocol']}: {guide}, {what}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds on one core, roughly: the constant of a step, eager or compiled, and its multiplications."""
    s = cell.settings
    pixels = {"digits": 64, "cifar10": 3072, "svhn": 3072}.get(s["dataset"], 784)
    decoder = s["latent_dim"] * s["hidden_dim"] + s["hidden_dim"] ** 2 + s["hidden_dim"] * pixels
    encoder = 0 if s["width"] is None else s["width"] * (pixels + s["width"])
    rate = 4e10 if device == "cpu" else 5e12
    products = 6 * s["batch_size"] * (decoder + encoder) / rate
    steps = s["steps"]
    if s["purpose"] == "tuning":
        steps *= len(s["grid"])
    elif s["protocol"] == "fair":
        # As a rule it has converged before the most steps.
        steps /= 2
    eager, compiled = steps * (_EAGER_STEP + products), _COMPILING + steps * (_COMPILED_STEP + products)
    taken = min(eager, compiled) if s["compile"] == "auto" else compiled if s["compile"] else eager
    return taken if s["purpose"] == "tuning" else taken + _MEASURING


def _settled(options: argparse.Namespace) -> dict[str, Any]:
    """The options, with the preset's values for those left out, after a check of each."""
    preset = _PRESETS[options.preset]
    given = {name: value for name in preset if (value := getattr(options, name, None)) is not None}
    settled = {**preset, **given, "architecture": options.architecture, "guides": options.guides or list(_GUIDES)}
    if settled["num_train"] == 0:
        settled["num_train"] = None
    for name, least in (("steps", 1), ("batch_size", 1), ("num_train", 1)):
        if settled[name] is not None and settled[name] < least:
            raise ValueError(f"Expected --{name.replace('_', '-')} of at least {least}, got {settled[name]}.")
    for width in settled["widths"]:
        if width < 1:
            raise ValueError(f"Expected --widths of at least 1, got {width}.")
    for seed in settled["seeds"]:
        if seed < 0:
            raise ValueError(f"Expected --seeds of at least 0, got {seed}.")
    if options.widths is not None and "amortized" not in settled["guides"]:
        raise ValueError("Expected --widths together with the amortized guide only: it alone has an encoder.")
    # As `datasets.load` reads them.
    settled["dataset"] = [name.lower() for name in settled["dataset"]]
    for name in ("dataset", "guides", "widths", "seeds", "noise", "protocol"):
        if len(set(settled[name])) != len(settled[name]):
            raise ValueError(f"Expected different values of --{name}, got {' '.join(map(str, settled[name]))}.")
    return settled


def _groups(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything but seeds and learning rates."""
    settled = _settled(options)
    for dataset in settled["dataset"]:
        name, size = _look_up(dataset, settled["num_train"], options.data_dir, options.download)
        if settled["batch_size"] > size:
            raise ValueError(
                f"Expected --batch-size of at most the {size} training images, got {settled['batch_size']}."
            )
        # One guide has widths, the others none.
        guides = [(g, k) for g in settled["guides"] for k in (settled["widths"] if g == "amortized" else [None])]
        for noise, protocol, (guide, width) in itertools.product(settled["noise"], settled["protocol"], guides):
            # Records from before ended epochs with a smaller batch, as published ones do.
            joins = protocol == "fair" and size % settled["batch_size"] != 0
            yield {
                **({"last_batch": "rollover"} if joins else {}),
                "dataset": name,
                "num_train": size,
                "data_seed": 0,
                "guide": guide,
                "width": width,
                "steps": settled["steps"],
                "batch_size": settled["batch_size"],
                "latent_dim": settled["latent_dim"],
                "hidden_dim": settled["hidden_dim"],
                "noise": noise,
                "architecture": settled["architecture"],
                "protocol": protocol,
                # Compiled sums round differently, so it decides the numbers.
                "compile": settled["compile"],
            }


@cache
def _look_up(dataset: str, num_train: int | None, data_dir: str | None, download: bool) -> tuple[str, int]:
    """The data set's name and its number of training images; read once, so that a missing file is told before any work."""
    data = datasets.load(dataset, data_dir=data_dir, num_train=num_train, download=download)
    return data.name, len(data.train)


def _tuning_cell(group: Mapping[str, Any]) -> Cell:
    steps = max(1, group["steps"] // _TUNING_SHARE)
    return _cell(group, "tuning", seed=_TUNING_SEED, steps=steps, grid=_GRID, ladder=_LADDER)


def _cell(group: Mapping[str, Any], purpose: str, **settings: Any) -> Cell:
    return Cell("images", {**group, "purpose": purpose, **settings})


def _best(tuning: Cell, records: Mapping[str, Record]) -> tuple[float, float] | None:
    """The learning rates of the best training bound, once it is known."""
    if tuning.key not in records:
        return None
    best = best_of(records[tuning.key]["result"]["trials"])
    return best["lr_local"], best["lr_global"]


def best_of(trials: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The trial with the highest bound; one that diverged has none."""
    return max(trials, key=lambda trial: -math.inf if trial["elbo"] is None else trial["elbo"])
