"""The published normal-normal example: an encoder that is linear in its row closes the gap, a constant one cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.comparison.cells import Comparison, Preset
from experiments.runner.record import Record
from experiments.runner.run_cell import Context

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]

summary = "normal rows around a common mean: encoders that are polynomials against a table, with exact bounds"

_COMPARISON = Comparison(
    "linear",
    {"F-VI": 1e-3, "degree 0": 1e-2, "degree 1": 1e-2, "degree 2": 1e-2},
    1954,
    {"quick": Preset(1_000, 1_500, 1, 5), "paper": Preset(10_000, 5_000, 100, 10)},
)
add_arguments, plan, count = _COMPARISON.add_arguments, _COMPARISON.plan, _COMPARISON.count
describe, estimate = _COMPARISON.describe, _COMPARISON.estimate


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one guide with all learning rates and seeds."""
    from experiments.comparison.training import train
    from experiments.sweeps.linear.problem import Linear

    return train(Linear(settings["rows"]), settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    from experiments.comparison.report import document
    from experiments.sweeps.linear import report

    return document(records, title="Normal rows", lead=report.LEAD, claims=report.claims, text=report.READING)
