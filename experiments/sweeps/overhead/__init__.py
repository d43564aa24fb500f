"""What generality costs: a training step with a guide of the library against the same guide written by hand in Pyro.

Both train the same model by `SVI` in turns in one process on one thread, a round of steps each, so that what else the
machine does falls on both. Times are of the machine and the moment: a cell run again gives other ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.overhead.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Time one pair of guides."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.sweeps.overhead.timing import time_steps

    return time_steps(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.overhead import report

    return report.document(records)
