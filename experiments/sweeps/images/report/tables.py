"""The table of the images sweep: a line a guide."""

from __future__ import annotations

from collections.abc import Callable

from experiments.reporting.statistics import Mean, mean_over_seeds, significant
from experiments.reporting.tables import Column, Table
from experiments.sweeps.images.report.runs import Run, number
from experiments.sweeps.images.report.sections import BOUND, FIXED, Arm, Section


def guides(section: Section) -> Table:
    """A line a guide and protocol: what it reached, at what cost, and whether it had ended."""

    def mean(name: str, *path: str, show: str = "csv", best: Callable | None = None) -> Column:
        return Column(name, lambda pair: pair[1].mean(*path), show, best)

    def value(name: str, of: Callable[[Run], float], show: str = "everywhere", digits: int = 3) -> Column:
        def text(value: float) -> str:
            return significant(value, digits)

        return Column(name, lambda pair: _mean(pair[1], of), show, text=text)

    columns = [
        *(Column(name, lambda pair, name=name: section.settings[name], "csv") for name in FIXED),
        Column("protocol", lambda pair: pair[0].protocol),
        Column("guide", lambda pair: pair[1].label),
        Column("seeds", lambda pair: len(pair[1].runs), "csv"),
        Column("diverged", lambda pair: len(pair[1].runs) - len(pair[1].done), "csv"),
        mean("train ELBO", *BOUND, show="everywhere", best=max),
        Column("joint gap", lambda pair: pair[0].joint_gap(pair[1])),
        Column("is F-VI's", lambda pair: list(pair[0].starts.values()).count(pair[1]), "csv"),
        mean("refined", "refined", "train", "gain", show="page"),
        mean("test refined", "refined", "test", "gain"),
        mean("test ELBO", "final", "test", "elbo", show="page", best=max),
        mean("train MSE", "final", "train", "mse"),
        mean("test MSE", "final", "test", "mse", show="page", best=min)._replace(
            text=lambda mse: significant(mse.value)
        ),
        value("steps", lambda run: run.steps),
        value("seconds", lambda run: run.seconds),
        Column("tuning s", lambda pair: _tuning(pair[1]), "csv"),
        value("late gain", lambda run: number(run.result("convergence", "late_gain")), digits=2),
        value("late s", lambda run: number(run.result("convergence", "late_seconds")), "csv"),
        Column("converged", lambda pair: _converged(pair[1])),
    ]
    note = (
        "Nats a row ± one standard error over seeds. Joint gap: F-VI's bound, the best of all that it contains, minus the "
        "guide's. Refined: gained by refining rows, the decoder frozen. Late gain: of the last half of the steps."
    )
    return Table(section.title, columns, section.arms, note, group="protocol", file="summary")


def _mean(arm: Arm, of: Callable[[Run], float]) -> float:
    return mean_over_seeds(Mean(of(run), 0.0, 1) for run in arm.done.values()).value


def _tuning(arm: Arm) -> float | None:
    return sum(number(run.result("train_seconds")) for run in arm.tunings) if arm.tunings else None


def _converged(arm: Arm) -> str | None:
    known = [run.converged for run in arm.done.values() if run.converged is not None]
    return f"{sum(known)} of {len(known)}" if known else None
