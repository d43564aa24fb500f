"""The cells of the sweep `context`: one a model, with all its windows."""

import argparse
from collections.abc import Mapping

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "the gap of an encoder by the window that it reads, in hidden Markov chains and Gaussian processes"

#: By model its numbers: (phi, q, r) of z_t ~ N(phi z_{t-1}, q^2), x_t ~ N(z_t, r^2); (length, r) of a Matern 3/2 process.
_MODELS = {
    "chain": ([0.9, 1.0, 1.0], [0.95, 0.5, 1.0], [0.9, 0.5, 1.5]),
    "process": ([4.0, 0.5], [12.0, 1.0]),
}
#: By kind the learning rate: wide windows of smooth processes are at the edge of what is stable at three times theirs.
_RATES = {"chain": 0.03, "process": 0.01}
#: By preset rows, series to measure on, and by kind the steps of a training and half-widths.
_PRESETS: dict[str, tuple[int, int, dict[str, tuple[int, list[int]]]]] = {
    # After half as many steps of a chain, and a quarter of those of a process, some windows are off their curves.
    "quick": (150, 200, {"chain": (2_400, [0, 1, 2, 3, 4]), "process": (9_600, [0, 1, 2, 4, 8])}),
    "paper": (300, 1_000, {"chain": (10_000, [0, 1, 2, 3, 4, 6, 8]), "process": (20_000, [0, 1, 2, 4, 8, 16])}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument("--preset", choices=sorted(_PRESETS), default="quick", help="rows, steps, series and windows")
    parser.add_argument("--models", nargs="+", choices=list(_MODELS), default=list(_MODELS), help="what is trained on")
    parser.add_argument("--steps", type=int, help="steps of a training; by default the preset's")


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    rows, series, by_kind = _PRESETS[options.preset]
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"Expected --steps of at least 1, got {options.steps}.")
    cells = []
    for kind in options.models:
        steps, windows = by_kind[kind]
        shared = {"rows": rows, "steps": options.steps or steps, "series": series, "rate": _RATES[kind], "seed": 0}
        cells += [
            Cell("context", {"model": kind, "numbers": each, "windows": windows, **shared}) for each in _MODELS[kind]
        ]
    return cells


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    return f"{s['model']} {', '.join(map(str, s['numbers']))}, {s['rows']} rows"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    return 5 + len(s["windows"]) * (5e-3 * s["steps"] + 1e-2 * s["series"])
