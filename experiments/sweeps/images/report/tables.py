"""The table of the images sweep: a line a guide."""

from __future__ import annotations

from operator import attrgetter

from experiments.reporting.statistics import significant
from experiments.reporting.tables import Column, Table
from experiments.sweeps.images.report.sections import BOUND, FIXED, Arm, Section


def guides(section: Section) -> Table:
    """A line a guide and protocol: what it reached, at what cost, and whether it had ended."""
    columns = [
        *(Column(name, lambda arm, name=name: section.settings[name], "csv") for name in FIXED),
        Column("protocol", attrgetter("protocol")),
        Column("guide", attrgetter("label")),
        Column("seeds", lambda arm: len(arm.runs), "csv"),
        Column("diverged", lambda arm: len(arm.runs) - len(arm.done), "csv"),
        Column("train ELBO", lambda arm: arm.mean(*BOUND), best=max),
        Column("joint gap", section.joint_gap),
        Column("is F-VI's", lambda arm: sum(start is arm for start in section.starts(arm.protocol).values()), "page"),
        Column("refined", lambda arm: arm.mean("refined", "train", "gain"), "page"),
        Column("test refined", lambda arm: arm.mean("refined", "test", "gain"), "csv"),
        Column("test ELBO", lambda arm: arm.mean("final", "test", "elbo"), "page", best=max),
        Column("train MSE", lambda arm: arm.mean("final", "train", "mse"), "csv"),
        Column(
            "test MSE", lambda arm: arm.mean("final", "test", "mse"), "page", min, lambda mean: significant(mean.value)
        ),
        Column("steps", lambda arm: arm.steps.value),
        Column("seconds", lambda arm: arm.mean("train_seconds").value),
        Column("tuning s", attrgetter("tuning_seconds"), "csv"),
        Column("late gain", lambda arm: arm.mean("convergence", "late_gain").value, text=_late),
        Column("late s", lambda arm: arm.mean("convergence", "late_seconds").value, "csv"),
        Column("converged", _converged),
    ]
    note = (
        "Nats a row ± one standard error. Joint gap: F-VI's bound minus the guide's; is F-VI's: the seeds in which its bound, "
        "the best of all that it contains, is this line's. 'F-VI from' went on from that encoder's outputs, whose steps and "
        "seconds are counted in. Refined: what rows gain from the guide's own output on, the decoder frozen. Late gain: of "
        "the last half of the steps; converged: the seeds in which it is less than the stated share of all gains."
    )
    return Table(section.title, columns, section.arms, note, group="protocol", file="summary")


def _late(value: float) -> str:
    return significant(value, 2)


def _converged(arm: Arm) -> str | None:
    known = [run.converged for run in arm.done.values() if run.converged is not None]
    return f"{sum(known)} of {len(known)}" if known else None
