"""The cells of the sweep `scale`: its options, and what decides each run."""

import argparse
from collections.abc import Mapping
from typing import Any

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["add_arguments", "count", "demands", "describe", "estimate", "plan", "summary"]

summary = "steps, memory and disk by the number of rows"

# What is measured, and the largest number of rows that it is measured at: a table in memory takes 200 bytes a row.
_GUIDES = {"constant": 10**9, "amortized": 10**9, "factorized": 10**7, "factorized on disk": 10**9}
# By preset: numbers of rows, and steps.
_PRESETS = {"quick": ((10**4, 10**6), 100), "paper": ((10**4, 10**6, 10**7, 10**8), 400)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this sweep."""
    parser.add_argument("--preset", choices=sorted(_PRESETS), default="quick", help="the numbers of rows and steps")
    parser.add_argument("--guides", nargs="+", choices=list(_GUIDES), default=list(_GUIDES), help="what to measure")
    parser.add_argument("--sizes", nargs="+", type=int, help="other numbers of rows than those of the preset")
    parser.add_argument("--steps", type=int, help="another number of steps than that of the preset")


def plan(options: argparse.Namespace, records: Mapping[str, Record]) -> list[Cell]:
    """All cells: none depends on another.

    Raises:
        ValueError: if numbers of rows or steps are not positive.
    """
    sizes, steps = _PRESETS[options.preset]
    sizes, steps = options.sizes or sizes, steps if options.steps is None else options.steps
    if min(*sizes, steps) < 1:
        raise ValueError(f"Expected --sizes and --steps of at least 1, got {sizes} and {steps}.")
    fixed = {"latents": 8, "numbers": 16, "batch": 256, "steps": steps, "seed": 0}
    return [
        Cell("scale", {"guide": guide, "size": size, **fixed})
        for guide in options.guides
        for size in sizes
        if size <= _GUIDES[guide]
    ]


def count(options: argparse.Namespace) -> int:
    """The number of cells."""
    return len(plan(options, {}))


def describe(cell: Cell) -> str:
    """A short label."""
    return f"{cell.settings['guide']}, {cell.settings['size']:,} rows"


def estimate(cell: Cell, *, device: str) -> float:
    """Seconds, roughly."""
    return 10 + 0.05 * cell.settings["steps"]


def demands(cell: Cell, *, device: str) -> dict[str, Any]:
    """A core, and the memory of the table where there is one."""
    table = 500 * cell.settings["size"] if cell.settings["guide"] == "factorized" else 0
    return {"num_cpus": 1, "memory": 2 * 10**9 + table}
