"""What many rows cost: steps, memory and disk by the number of rows, for the three guides and for a table on disk.

Times are of the machine and the moment: a cell run again gives other ones. Memory and reads of the disk are what Linux says of
the process; elsewhere they are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.scale.cells import add_arguments, count, demands, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "demands", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Measure one guide at one number of rows."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.sweeps.scale.measuring import measure

    return measure(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.scale import report

    return report.document(records)
