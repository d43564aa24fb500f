"""The table of the images sweep: a line a guide."""

from __future__ import annotations

from experiments.reporting.statistics import significant
from experiments.reporting.tables import Column, Table
from experiments.sweeps.images.report.runs import number
from experiments.sweeps.images.report.sections import BOUND, FIXED, Arm, Section


def guides(section: Section) -> Table:
    """A line a guide and protocol: what it reached, at what cost, and whether it had ended."""
    comparisons = {comparison.protocol: comparison for comparison in section.comparisons}

    def starts(arm: Arm) -> int:
        return list(comparisons[arm.protocol].starts.values()).count(arm)

    def tuning(arm: Arm) -> float | None:
        return sum(number(run.result("train_seconds")) for run in arm.tunings) if arm.tunings else None

    def late(arm: Arm, name: str) -> float:
        return arm.average(lambda run: number(run.result("convergence", name)))

    def converged(arm: Arm) -> str | None:
        known = [run.converged for run in arm.done.values() if run.converged is not None]
        return f"{sum(known)} of {len(known)}" if known else None

    columns = [
        *(Column(name, lambda arm, name=name: section.settings[name], "csv") for name in FIXED),
        Column("protocol", "protocol"),
        Column("guide", "label"),
        Column("seeds", lambda arm: len(arm.runs), "csv"),
        Column("diverged", lambda arm: len(arm.runs) - len(arm.done), "csv"),
        Column("train ELBO", lambda arm: arm.mean(*BOUND), best=max),
        Column("joint gap", lambda arm: comparisons[arm.protocol].joint_gap(arm)),
        Column("is F-VI's", starts, "csv"),
        Column("refined", lambda arm: arm.mean("refined", "train", "gain"), "page"),
        Column("test refined", lambda arm: arm.mean("refined", "test", "gain"), "csv"),
        Column("test ELBO", lambda arm: arm.mean("final", "test", "elbo"), "page", max),
        Column("train MSE", lambda arm: arm.mean("final", "train", "mse"), "csv"),
        Column(
            "test MSE", lambda arm: arm.mean("final", "test", "mse"), "page", min, lambda mse: significant(mse.value)
        ),
        Column("steps", lambda arm: arm.average(lambda run: run.steps)),
        Column("seconds", lambda arm: arm.average(lambda run: run.seconds)),
        Column("tuning s", tuning, "csv"),
        Column("late gain", lambda arm: late(arm, "late_gain"), text=lambda gain: significant(gain, 2)),
        Column("late s", lambda arm: late(arm, "late_seconds"), "csv"),
        Column("converged", converged),
    ]
    note = (
        "Nats a row ± one standard error over seeds. Joint gap: F-VI's bound, the best of all that it contains, minus the "
        "guide's. Refined: gained by refining rows, the decoder frozen. Late gain: of the last half of the steps."
    )
    return Table(section.title, columns, section.arms, note, group="protocol", file="summary")
