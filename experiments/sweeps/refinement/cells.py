"""The cells of the sweep `refinement`: its options, and what decides each run."""

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

from experiments import datasets
from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["BATCH", "add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "bounds of held-out rows against seconds of refinement, from the encoder, the prior and scratch"

#: Rows a step of the training.
BATCH = 100
_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"dataset": ["digits"], "training_steps": 1500, "latent_dim": 8, "hidden_dim": 64, "rows": 100},
    "paper": {
        "dataset": ["mnist", "fashionmnist"],
        "training_steps": 20_000,
        "latent_dim": 50,
        "hidden_dim": 200,
        "rows": 1000,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep; those left out are the preset's."""
    add = parser.add_argument
    add("--preset", choices=sorted(_PRESETS), default="quick", help="settings of everything that is not given")
    add("--dataset", nargs="+", metavar="NAME", help="one or more data sets with one channel, for example mnist")
    add("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="of initial values, minibatches and draws")
    numbers = {
        "training_steps": f"steps of {BATCH} rows that model and encoder are trained for",
        "latent_dim": "latents a row",
        "hidden_dim": "units of each of the two hidden layers of decoder and encoder",
        "rows": "test rows that are refined: the first ones",
    }
    for name, text in numbers.items():
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    settled = {
        name: default if (given := getattr(options, name)) is None else given
        for name, default in _PRESETS[options.preset].items()
    }
    for name, value in settled.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} of at least 1, got {value}.")
    cells = []
    for dataset, seed in itertools.product(settled.pop("dataset"), options.seeds):
        data = datasets.load(dataset, data_dir=options.data_dir, download=options.download)
        if data.train.shape[1] != 1 or settled["rows"] > len(data.test):
            raise ValueError(
                f"Expected --dataset with one channel and at least {settled['rows']} test images, got {data.name} with "
                f"{data.train.shape[1]} and {len(data.test)}."
            )
        # Records from before ended epochs with a smaller batch.
        joined = {"last_batch": "rollover"} if len(data.train) % BATCH else {}
        cells.append(Cell("refinement", {**settled, **joined, "dataset": data.name, "seed": seed}))
    return cells


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    return f"{cell.settings['dataset']}, seed {cell.settings['seed']}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    return 20 + 0.01 * s["training_steps"] + 0.05 * s["rows"] * (s["hidden_dim"] / 100)
