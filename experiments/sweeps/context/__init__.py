"""How far an encoder has to look: gaps of windows in hidden Markov chains and Gaussian processes, beside their closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.context.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one encoder a window and measure what each loses."""
    from experiments.sweeps.context.training import measure

    return measure(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    from experiments.sweeps.context import report

    return report.document(records)
