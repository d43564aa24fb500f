"""An amortized guide against F-VI, seed by seed: at equal steps, at equal seconds, and where training ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

from experiments.reporting.statistics import (
    Duration,
    Mean,
    Measured,
    mean_over_seeds,
    median_duration,
    paired_difference,
    ratio_text,
)
from experiments.reporting.tables import Column, Table
from experiments.sweeps.images.report.sections import BOUND, TITLES, Arm, Section

#: The first claim speaks of encoders at least this wide.
WIDE = 64
#: A guide is at A-VI's level when what it lacks is less than this share of the level's lead over the constant guide.
LEVEL_SHARE = 0.02


class Claim(NamedTuple):
    """Training bounds of A-VI and F-VI, their difference paired by seed, and the times of F-VI (slow) and A-VI (fast)."""

    section: Section
    arm: Arm
    at: str
    amortized: Mean
    factorized: Mean
    gap: Mean
    slow: Duration | None
    fast: Duration | None

    @property
    def data(self) -> str:
        fixed = self.section.settings
        return f"{TITLES.get(fixed['dataset'], fixed['dataset'])}, {fixed['noise']}"

    @property
    def reached(self) -> str:
        """Whether A-VI's bound cannot be told from F-VI's."""
        if self.at == "end of training":
            return "not converged"
        return "unknown" if not self.gap.known else "above" if self.gap.sign < 0 else "no" if self.gap.sign else "yes"


def compare(section: Section, arm: Arm) -> Iterator[Claim]:
    """One amortized guide against F-VI under its protocol: equal steps, equal seconds, and the end of training.

    Curves are raced: F-VI from its own start, the highest bounds after the steps or seconds of A-VI's training, times to A-VI's
    level. At the end F-VI has the best of its starts; times are those of all training, bounds where it had not converged.
    """
    own = section.arm(arm.protocol, "F-VI")
    level = levels(section, arm)
    for unit, at in (("step", "equal steps"), ("seconds", "equal seconds")):
        ends = {seed: run.curve[unit][-1] for seed, run in arm.done.items() if own and seed in own.done}
        reached = [{seed: each.done[seed].at(unit, end) for seed, end in ends.items()} for each in (arm, own)]
        times = [
            median_duration(each.runs[seed].until(level[seed], unit) for seed in level if seed in each.runs)
            for each in (own, arm)
            if own
        ]
        yield _claim(section, arm, at, *reached, *(times or [None, None]))
    trained = [[each.runs[seed] for seed, each in section.trained(arm.protocol).items()], [*arm.done.values()]]
    times = [median_duration(Duration(run.curve["seconds"][-1], not run.converged) for run in runs) for runs in trained]
    at = "convergence" if all(run.converged for runs in trained for run in runs) else "end of training"
    yield _claim(section, arm, at, arm.each(*BOUND), section.factorized(arm.protocol), *times)


def _claim(
    section: Section,
    arm: Arm,
    at: str,
    amortized: Mapping[int, Measured],
    factorized: Mapping[int, Measured],
    slow: Duration | None,
    fast: Duration | None,
) -> Claim:
    means = (mean_over_seeds(by_seed.values()) for by_seed in (amortized, factorized))
    return Claim(section, arm, at, *means, paired_difference(factorized, amortized), slow, fast)


def levels(section: Section, arm: Arm) -> dict[int, float]:
    """A-VI's last bound less a share of its lead over the constant guide, by seed; read off curves, as are times."""
    constant = section.arm(arm.protocol, "constant")
    floor = mean_over_seeds(Measured(run.last) for run in (constant.done.values() if constant else ()))
    lasts = {seed: run.last for seed, run in arm.done.items()}
    leads = {seed: max(last - floor.value, 0.0) if floor.known else 0.0 for seed, last in lasts.items()}
    return {seed: last - LEVEL_SHARE * leads[seed] for seed, last in lasts.items()}


def table(sections: Sequence[Section]) -> Table:
    """Both claims of the published comparison, by data set and protocol."""
    columns = [
        Column("data", attrgetter("data"), "page"),
        Column("protocol", attrgetter("arm.protocol"), "page"),
        Column("compared at", attrgetter("at"), "page"),
        Column("reaches F-VI?", attrgetter("reached"), "page"),
        Column("F-VI - A-VI", attrgetter("gap"), "page"),
        Column("A-VI", attrgetter("amortized"), "page"),
        Column("width", attrgetter("arm.width"), "page"),
        Column("F-VI", attrgetter("factorized"), "page"),
        Column("time, F-VI / A-VI", lambda claim: ratio_text(claim.slow, claim.fast), "page"),
    ]
    note = (
        f"Nats a row ± one standard error. A-VI: the best of width {WIDE} or more, failing that the widest. Equal steps, equal "
        "seconds: those that A-VI's training took, F-VI from its own start; times are those to A-VI's level. Convergence: F-VI "
        "from the best of its starts; times are all training seconds. Claimed: 2 to 3."
    )
    pairs = [
        (section, protocol) for section in sections for protocol in section.protocols if section.factorized(protocol)
    ]
    arms = [(section, section.best_amortized(protocol, least=WIDE)) for section, protocol in pairs]
    items = [claim for section, arm in arms if arm for claim in compare(section, arm)]
    return Table('"k ≥ 64 reaches F-VI", "two to three times faster"', columns, items, note, group="data")
