"""An amortized guide against F-VI, seed by seed: at equal steps, at equal seconds, and where training ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from experiments.reporting.statistics import (
    Duration,
    Mean,
    mean_over_seeds,
    median_duration,
    paired_difference,
    ratio_text,
)
from experiments.reporting.tables import Column, Table
from experiments.sweeps.images.report.sections import BOUND, Arm, Comparison, Section

#: The first claim speaks of encoders at least this wide.
WIDE = 64
#: A guide is at A-VI's level when what it lacks is less than this share of the level's lead over the constant guide.
LEVEL_SHARE = 0.02


class Claim(NamedTuple):
    """Training bounds of A-VI and F-VI, their difference paired by seed, and the times of A-VI (fast) and F-VI (slow)."""

    section: Section
    arm: Arm
    at: str
    amortized: Mean
    factorized: Mean
    gap: Mean
    fast: Duration | None
    slow: Duration | None

    @property
    def reached(self) -> str:
        """Whether A-VI's bound cannot be told from F-VI's."""
        if self.at == "end of training":
            return "not converged"
        return "unknown" if not self.gap.known else {-1: "above", 0: "yes", 1: "no"}[self.gap.sign]


def compare(section: Section, comparison: Comparison, arm: Arm) -> Iterator[Claim]:
    """One amortized guide against F-VI: equal steps, equal seconds, and the end of training.

    Curves are raced: F-VI from its own start, the highest bounds after the steps or seconds of A-VI's training, times to A-VI's
    level. At the end F-VI has the best of its starts; times are those of all training, bounds where it had not converged.
    """

    def claim(at: str, bounds: Sequence[Mapping[int, Mean]], times: Sequence[Sequence[Duration]]) -> Claim:
        means = (mean_over_seeds(by_seed.values()) for by_seed in bounds)
        return Claim(section, arm, at, *means, paired_difference(*reversed(bounds)), *map(median_duration, times))

    own, level = comparison.arm("F-VI"), levels(comparison, arm)
    for unit, at in (("step", "equal steps"), ("seconds", "equal seconds")):
        ends = {seed: run.curve[unit][-1] for seed, run in arm.done.items() if seed in own.done}
        reached = [{seed: each.done[seed].at(unit, end) for seed, end in ends.items()} for each in (arm, own)]
        times = [
            [each.runs[seed].until(level[seed], unit) for seed in level if seed in each.runs] for each in (arm, own)
        ]
        yield claim(at, reached, times)
    trained = [[*arm.done.values()], [each.runs[seed] for seed, each in comparison.trained.items()]]
    times = [[Duration(run.curve["seconds"][-1], not run.converged) for run in runs] for runs in trained]
    ended = all(run.converged for runs in trained for run in runs)
    yield claim("convergence" if ended else "end of training", [arm.each(*BOUND), comparison.bound], times)


def levels(comparison: Comparison, arm: Arm) -> dict[int, float]:
    """A-VI's last bound less a share of its lead over the constant guide, by seed; read off curves, as are times."""
    lasts = {seed: run.curve["elbo"][-1] for seed, run in arm.done.items()}
    floor = comparison.arm("constant").average(lambda run: run.curve["elbo"][-1])
    # Nothing is above a floor that is not known, nan.
    return {seed: last - LEVEL_SHARE * (last - floor if last > floor else 0.0) for seed, last in lasts.items()}


def table(sections: Sequence[Section]) -> Table:
    """Both claims of the published comparison, by data set and protocol."""
    columns = [
        Column("data", lambda claim: f"{claim.section.data}, {claim.section.settings['noise']}", "page"),
        Column("protocol", "arm.protocol", "page"),
        Column("compared at", "at", "page"),
        Column("reaches F-VI?", "reached", "page"),
        Column("F-VI - A-VI", "gap", "page"),
        Column("A-VI", "amortized", "page"),
        Column("width", "arm.width", "page"),
        Column("F-VI", "factorized", "page"),
        Column("time, F-VI / A-VI", lambda claim: ratio_text(claim.slow, claim.fast), "page"),
    ]
    pairs = [(section, each) for section in sections for each in section.comparisons if each.bound]
    arms = [(*pair, pair[1].best(least=WIDE)) for pair in pairs]
    found = [claim for section, each, arm in arms if arm for claim in compare(section, each, arm)]
    note = f"Nats a row ± one standard error; times to A-VI's level, last of all training. A-VI: the best from width {WIDE} on."
    return Table('"k ≥ 64 reaches F-VI", "two to three times faster"', columns, found, note, group="data")
