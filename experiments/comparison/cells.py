"""The cells of a comparison: one an arm, which trains all learning rates and seeds of it in one graph."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.runner.cell import Cell
from experiments.runner.record import Record

__all__ = ["Comparison", "Preset"]

#: The learning rates that a guide may have by the fair protocol, where a sweep has no others.
RATES = (0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Preset:
    """How large a comparison is: rows, steps, draws of the guide a step, seeds; and its arms, if these are not all."""

    rows: int
    steps: int
    draws: int
    seeds: int
    arms: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """A sweep that compares guides.

    Args:
        name: of the sweep.
        arms: by arm the learning rate of the published protocol.
        first_seed: the published one; the others follow it.
        presets: by name.
        rates: the learning rates of the fair protocol.
    """

    name: str
    arms: Mapping[str, float]
    first_seed: int
    presets: Mapping[str, Preset]
    rates: Sequence[float] = RATES

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of this sweep."""
        parser.add_argument(
            "--preset", choices=sorted(self.presets), default="quick", help="rows, steps, draws, seeds and arms"
        )
        parser.add_argument(
            "--arms", nargs="+", choices=list(self.arms), help="what is trained; by default the preset's"
        )
        for option, text in (("rows", "rows of data"), ("steps", "steps of a training"), ("draws", "draws a step"),
                             ("seeds", "number of seeds")):  # fmt: skip
            parser.add_argument(f"--{option}", type=int, help=f"{text}; by default the preset's")

    def plan(self, options: argparse.Namespace, records: Mapping[str, Record]) -> Sequence[Cell]:
        """All cells: none depends on another."""
        preset = self.presets[options.preset]
        chosen = {name: getattr(options, name) or getattr(preset, name) for name in ("rows", "steps", "draws", "seeds")}
        if min(chosen.values()) < 1 or chosen["rows"] < 4:
            raise ValueError(f"Expected positive numbers and at least 4 rows, got {chosen}.")
        seeds = list(range(self.first_seed, self.first_seed + chosen.pop("seeds")))
        return [
            Cell(
                self.name,
                {"arm": arm, **chosen, "seeds": seeds, "published_rate": self.arms[arm], "rates": list(self.rates)},
            )
            for arm in options.arms or preset.arms or self.arms
        ]

    def count(self, options: argparse.Namespace) -> int:
        """The number of cells."""
        return len(self.plan(options, {}))

    def describe(self, cell: Cell) -> str:
        """A short label."""
        s = cell.settings
        return f"{s['arm']}, {s['rows']} rows, {s['steps']} steps, {len(s['seeds'])} seeds"

    def estimate(self, cell: Cell, *, device: str) -> float:
        """Seconds, roughly."""
        s = cell.settings
        trained = len(s["seeds"]) * (1 + len(s["rates"]))
        return 15 + 1e-7 * s["steps"] * s["rows"] * s["draws"] * trained
