"""How noisy a gradient is, by estimator: closed forms, a linear model, and what the noise costs in training.

The lecture behind this project: the reparameterization trick turns the high-variance "policy gradient" of a variational bound
into a low-variance one, for continuous latents only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from experiments.runner.record import Record
from experiments.runner.run_cell import Context
from experiments.sweeps.gradients.cells import add_arguments, count, describe, estimate, plan, summary

if TYPE_CHECKING:
    from experiments.reporting.document import Document

__all__ = ["add_arguments", "count", "describe", "document", "estimate", "plan", "run", "summary"]


def run(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Measure or train one cell."""
    # The process that plans has no use for torch's and Pyro's seconds of import.
    if settings["kind"] in ("training", "trials"):
        from experiments.sweeps.gradients import training

        return (training.train if settings["kind"] == "training" else training.try_rates)(settings, context)
    from experiments.sweeps.gradients.noise import measure

    return measure(settings, context)


def document(records: Mapping[str, Record]) -> Document:
    """The report of these records, by key."""
    # Drawing needs libraries that running does not.
    from experiments.sweeps.gradients import report

    return report.document(records)
