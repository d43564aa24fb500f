"""The published saw of a series: what an encoder loses that does not read the row before, and what one gains that does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from experiments.comparison.cells import Comparison, Preset
from experiments.runner.record import Record
from experiments.runner.run_cell import Context

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]

summary = (
    "latents around the last observation: encoders of x_n and of (x_{n-1}, x_n) against a table, with exact bounds"
)


def _arms(own: Iterable[int], both: Iterable[int]) -> list[str]:
    """With networks of x_n alone and of both rows, of so many units a layer."""
    return ["F-VI", "constant", "x_n, linear", *(f"x_n, {k}" for k in own), *(f"window(1, 0), {k}" for k in both)]


_ARMS = _arms((4, 6, 10, 20), (2, 4, 6, 10))
_COMPARISON = Comparison(
    "series",
    dict.fromkeys(_ARMS, 1e-3),
    2013,
    # After 3,000 steps networks of both rows still lack more than a bound of 1,000 draws can tell.
    {"quick": Preset(1_000, 30_000, 1, 5, _arms((10,), (4, 6, 10))), "paper": Preset(1_000, 30_000, 100, 10)},
)
add_arguments, plan, count = _COMPARISON.add_arguments, _COMPARISON.plan, _COMPARISON.count
describe, estimate = _COMPARISON.describe, _COMPARISON.estimate


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one guide with all learning rates and seeds."""
    from experiments.comparison.training import train
    from experiments.sweeps.series.problem import Series

    return train(Series(settings["rows"]), settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    from experiments.comparison.report import document
    from experiments.sweeps.series import report

    return document(records, title="The saw of a series", lead=report.LEAD, claims=report.claims, text=report.READING)
