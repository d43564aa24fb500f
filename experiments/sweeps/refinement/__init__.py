"""What closing the amortization gap of held-out rows costs: bound against seconds of refinement, from three starts.

Extends Kim, Wiseman, Miller, Sontag and Rush, "Semi-amortized variational autoencoders" (2018,
https://arxiv.org/abs/1802.02550), who take 20 steps from the encoder's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.refinement.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one autoencoder, and refine the factors of its test rows."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    from experiments.sweeps.refinement.refining import measure_cell

    return measure_cell(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.refinement import report

    return report.document(records)
