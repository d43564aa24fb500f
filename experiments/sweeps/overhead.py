"""What generality costs: a training step with a guide of the library against the same guide written by hand in Pyro.

Both train the same model by `SVI` in turns in one process on one thread, a round of steps each, so that what else the
machine does falls on both. Times are of the machine and the moment: a cell run again gives other ones.
"""

import argparse
import itertools
from collections.abc import Mapping
from typing import Any

from experiments.cell import Cell
from experiments.run import Context
from experiments.store import Record

__all__ = ["add_arguments", "count", "describe", "estimate", "plan", "run", "summary"]

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


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Time one pair of guides."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.step_timing import time_steps

    return time_steps(settings, context)
