"""The cells of the sweep `suboptimality`: its options, and what decides each run."""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from experiments import datasets
from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "gaps of variational autoencoders on binary images, split into approximation and amortization"

_ENCODERS = ("small", "wide", "conv")
_FAMILIES = ("diagonal", "full", "flow")
# What may hold each family, and so split its approximation gap further.
_RICHER = {"diagonal": ("full", "flow"), "full": ("flow",), "flow": ()}

_PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "dataset": ["digits"],
        "num_train": None,
        "encoders": ["small", "wide"],
        "families": ["diagonal", "full"],
        "seeds": [0],
        "steps": 2000,
        # Fast enough to leave the plateau on which the latents are not used.
        "lr": 3e-3,
        "batch_size": 100,
        "warm_up": 500,
        "latent_dim": 8,
        "hidden_dim": 128,
        "wide_dim": 320,
        "compile": "auto",
        "rows": 100,
        "num_samples": 500,
        "refine_steps": 200,
        "refine_lr": 0.2,
        "max_rounds": 5,
        "ais_rows": 10,
        "ais_chains": 25,
        "ais_temperatures": 50,
        "ais_leapfrog": 5,
    },
    "paper": {
        "dataset": ["mnist", "fashionmnist"],
        "num_train": None,
        "encoders": ["small", "wide", "conv"],
        "families": ["diagonal", "full", "flow"],
        "seeds": [0],
        # 3,280 epochs of 600 batches.
        "steps": 1_968_000,
        "lr": 1e-3,
        "batch_size": 100,
        "warm_up": 30_000,
        "latent_dim": 50,
        "hidden_dim": 200,
        "wide_dim": 500,
        "compile": "auto",
        "rows": 1000,
        "num_samples": 5000,
        "refine_steps": 600,
        "refine_lr": 0.2,
        "max_rounds": 10,
        "ais_rows": 1000,
        "ais_chains": 100,
        "ais_temperatures": 500,
        "ais_leapfrog": 10,
    },
}
_LEAST = {"warm_up": 0, "num_samples": 25, "ais_rows": 0, "ais_chains": 25}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep; those left out are the preset's."""
    add = parser.add_argument
    add("--preset", choices=sorted(_PRESETS), default="quick", help="settings of everything that is not given")
    add("--dataset", nargs="+", metavar="NAME", help="one or more data sets with one channel, for example mnist")
    add("--num-train", type=int, metavar="N", help="a seeded subset of N training images; 0 for all")
    add("--encoders", nargs="+", choices=_ENCODERS, help="MLP as wide as the decoder, wider MLP, convolutional")
    add("--families", nargs="+", choices=_FAMILIES, help="what the guide is trained with: normals or flows")
    add(
        "--richer",
        choices=("full", "flow", "none"),
        default="full",
        help="a family that splits the approximation gap further",
    )
    add("--seeds", nargs="+", type=int, metavar="SEED", help="of initial values, minibatches and draws")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the training step, or do not (default: where a count of operations says that it pays)",
    )
    add("--lr", type=float, help="the learning rate at first; it falls to a tenth of it")
    add(
        "--refine-lr",
        type=float,
        help="of a step in search of a row's best factor, as a share of the natural gradient; less where a row gains little",
    )
    numbers = {
        "steps": "training steps of a cell",
        "batch_size": "rows of a minibatch",
        "warm_up": "steps over which the weight of the KL divergence rises from 0 to 1",
        "latent_dim": "latents a row",
        "hidden_dim": "units of each of the two hidden layers of the decoder, and of the small encoder",
        "wide_dim": "units of each of the two hidden layers of the wide encoder",
        "rows": "training rows, and test rows, whose gaps are measured: the first ones",
        "num_samples": "draws for the bounds and for the importance-weighted bound",
        "refine_steps": "steps of a round in search of a row's best factor",
        "max_rounds": "rounds of it at most",
        "ais_rows": "of the measured rows the first ones whose evidence is annealed too; 0 for none",
        "ais_chains": "chains a row",
        "ais_temperatures": "temperatures of each chain",
        "ais_leapfrog": "leapfrog steps of each transition",
    }
    for name, text in numbers.items():
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    return list(_cells(options))


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    return f"{s['dataset']}, {s['encoder']} encoder, {s['family']} family, seed {s['seed']}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds on one core, roughly: the multiplications of training, of the draws, of refinement and of the chains."""
    s = cell.settings
    pixels = 64 if s["dataset"] == "digits" else 784
    decoder = s["latent_dim"] * s["hidden_dim"] + s["hidden_dim"] ** 2 + s["hidden_dim"] * pixels
    encoder = s["encoder_dim"] * (pixels + s["encoder_dim"])
    rate = 2e10 if device == "cpu" else 2e12
    handlers = 0.001 if s["compile"] and s["steps"] > 3000 else 0.005
    training = s["steps"] * (handlers + 6 * s["batch_size"] * (decoder + encoder) / rate)
    factors = 2 if s["richer"] is None else 3
    drawn = factors * s["num_samples"] * s["rows"] * 2
    refined = factors * 3 * s["refine_steps"] * s["rows"] * 6
    annealed = s["ais_rows"] * s["ais_chains"] * s["ais_temperatures"] * (s["ais_leapfrog"] + 1) * 6
    return 10 + training + 2 * (drawn + refined + annealed) * decoder / rate


def _settled(options: argparse.Namespace) -> dict[str, Any]:
    """The options, with the preset's values for those left out, after a check of each."""
    preset = _PRESETS[options.preset]
    settled = {
        name: default if (given := getattr(options, name)) is None else given for name, default in preset.items()
    }
    if settled["num_train"] == 0:
        settled["num_train"] = None
    for name, value in settled.items():
        least = _LEAST.get(name, 1)
        if type(value) is int and value < least:
            raise ValueError(f"Expected --{name.replace('_', '-')} of at least {least}, got {value}.")
    for name in ("lr", "refine_lr"):
        if not 0 < settled[name] < math.inf:
            raise ValueError(f"Expected --{name.replace('_', '-')} above 0, got {settled[name]}.")
    if settled["warm_up"] > settled["steps"]:
        raise ValueError(f"Expected --warm-up of at most the {settled['steps']} steps, got {settled['warm_up']}.")
    if settled["ais_rows"] > settled["rows"]:
        raise ValueError(f"Expected --ais-rows of at most the {settled['rows']} --rows, got {settled['ais_rows']}.")
    for seed in settled["seeds"]:
        if seed < 0:
            raise ValueError(f"Expected --seeds of at least 0, got {seed}.")
    # As `datasets.load` reads them.
    settled["dataset"] = [name.lower() for name in settled["dataset"]]
    for name in ("dataset", "encoders", "families", "seeds"):
        if len(set(settled[name])) != len(settled[name]):
            raise ValueError(f"Expected different values of --{name}, got {' '.join(map(str, settled[name]))}.")
    return settled


def _cells(options: argparse.Namespace) -> Iterator[Cell]:
    settled = _settled(options)
    varied = [settled.pop(name) for name in ("dataset", "encoders", "families", "seeds")]
    num_train, wide = settled.pop("num_train"), settled.pop("wide_dim")
    for dataset, encoder, family, seed in itertools.product(*varied):
        name, size, held_out = _look_up(dataset, num_train, options.data_dir, options.download)
        for option, limit in (("batch_size", size), ("rows", min(size, held_out))):
            if settled[option] > limit:
                raise ValueError(
                    f"Expected --{option.replace('_', '-')} of at most the {limit} images of {name}, got {settled[option]}."
                )
        # Records from before ended epochs with a smaller batch.
        joins = size % settled["batch_size"] != 0
        yield Cell(
            "suboptimality",
            {
                **settled,
                **({"last_batch": "rollover"} if joins else {}),
                "dataset": name,
                "num_train": size,
                "data_seed": 0,
                "encoder": encoder,
                "encoder_dim": wide if encoder == "wide" else settled["hidden_dim"],
                "family": family,
                "richer": options.richer if options.richer in _RICHER[family] else None,
                "seed": seed,
            },
        )


@cache
def _look_up(dataset: str, num_train: int | None, data_dir: str | None, download: bool) -> tuple[str, int, int]:
    """The data set's name and its numbers of images; read once, so that a missing file is told before any work."""
    data = datasets.load(dataset, data_dir=data_dir, num_train=num_train, download=download)
    if data.train.shape[1] != 1:
        raise ValueError(f"Expected --dataset with images of one channel, to make binary, got {data.name}.")
    return data.name, len(data.train), len(data.test)
