"""Inference suboptimality of variational autoencoders on binary images: what the family costs, and what the encoder.

Reproduces Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders" (2018,
https://arxiv.org/abs/1801.03558), with standard errors, on training and on test rows, and the refinement of Kim, Wiseman,
Miller, Sontag and Rush, "Semi-amortized variational autoencoders" (2018, https://arxiv.org/abs/1802.02550), beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.suboptimality.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train and measure one cell."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.sweeps.suboptimality.gaps import measure_cell

    return measure_cell(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.suboptimality import report

    return report.document(records)
