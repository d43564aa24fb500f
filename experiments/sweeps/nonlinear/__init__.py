"""The published nonlinear example: encoders by width against a table of one start and of several, and the best of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.comparison.cells import Comparison, Preset
from experiments.runner.record import Record
from experiments.runner.run_cell import Context

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]

summary = (
    "a nonlinear mean and scale, posteriors of several modes: encoders by width against tables, bounds by quadrature"
)

_ARMS = ["F-VI", "F-VI, several starts", "constant", *(f"x_n, {k}" for k in (1, 2, 4, 8, 16, 24, 32))]
_COMPARISON = Comparison(
    "nonlinear",
    dict.fromkeys(_ARMS, 1e-2),
    1789,
    {"quick": Preset(1_000, 3_000, 10, 5), "paper": Preset(10_000, 20_000, 100, 10)},
    # At 0.1 encoders diverge.
    rates=(0.003, 0.01, 0.03),
)
add_arguments, plan, count = _COMPARISON.add_arguments, _COMPARISON.plan, _COMPARISON.count
describe, estimate = _COMPARISON.describe, _COMPARISON.estimate


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one guide with all learning rates and seeds."""
    from experiments.comparison.training import train
    from experiments.sweeps.nonlinear.problem import Nonlinear

    return train(Nonlinear(settings["rows"]), settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    from experiments.comparison.report import document
    from experiments.sweeps.nonlinear import report

    return document(records, title="A nonlinear model", lead=report.LEAD, claims=report.claims, text=report.READING)
