"""How long a training step takes: the library's steps, and the ways in which others take the same step.

Every way runs in a process of its own on one thread. They take turns, a round of steps each, so that what else the machine
does falls on all of them. Times are of the machine and the moment: a cell run again gives other ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.speed.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Time all ways of taking the steps of one workload."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.sweeps.speed.timing import time_implementations

    return time_implementations(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.speed import report

    return report.document(records)
