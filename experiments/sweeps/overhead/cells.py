"""The cells of the sweep `overhead`: its options, and what decides each run."""

import argparse
import itertools
from collections.abc import Mapping

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["add_arguments", "count", "describe", "estimate", "plan", "summary"]

summary = "a step through the library's guides against the same guides written by hand in Pyro"

_GUIDES = ("constant", "amortized", "factorized")
# By workload: who chooses the rows, seconds of a step roughly.
_WORKLOADS = {"tiny": (("given", "drawn"), 0.005), "image": (("given",), 0.09)}
# By preset: the number of rounds, and by workload the steps of a round.
_PRESETS = {"quick": (15, {"tiny": 20, "image": 1}), "paper": (60, {"tiny": 50, "image": 4})}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument("--preset", choices=sorted(_PRESETS), default="quick", help="the number of rounds and steps")
    parser.add_argument("--guides", nargs="+", choices=_GUIDES, default=list(_GUIDES), help="the guides to time")
    parser.add_argument(
        "--workloads", nargs="+", choices=sorted(_WORKLOADS), default=list(_WORKLOADS), help="the models to train"
    )


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another."""
    rounds, steps = _PRESETS[options.preset]
    return [
        Cell("overhead", {"workload": w, "guide": g, "rows": rows, "rounds": rounds, "steps": steps[w], "seed": 0})
        for w, g in itertools.product(options.workloads, options.guides)
        for rows in _WORKLOADS[w][0]
    ]


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    s = cell.settings
    return f"{s['workload']} model, {s['guide']} guide, rows {s['rows']}"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    s = cell.settings
    return 3 + 2 * s["rounds"] * s["steps"] * _WORKLOADS[s["workload"]][1]
