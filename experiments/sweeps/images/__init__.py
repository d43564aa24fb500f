"""The Bayesian deep generative model on images: how much does amortization cost?

Reproduces the image experiment of Margossian and Blei, "Amortized Variational Inference: When and Why?" (2024,
https://arxiv.org/abs/2307.11018), with the exact bound, and beside its protocol (one learning rate for all) a fair one
(learning rates tuned for every guide at equal budgets).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.images.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train and measure one cell."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    if settings["purpose"] == "tuning":
        from experiments.sweeps.images.tuning import tune_cell

        return tune_cell(settings, context)
    from experiments.sweeps.images.training import train_cell

    return train_cell(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.images import report

    return report.document(records)
