"""An amortized guide against F-VI, seed by seed: at equal steps, at equal seconds, and where training ended."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.reporting.statistics import (
    Duration,
    Mean,
    Measured,
    Passage,
    mean_over_seeds,
    median_duration,
    paired_difference,
    ratio_text,
)
from experiments.sweeps.images.report.records import CellRecord
from experiments.sweeps.images.report.sections import Arm, Section
from experiments.sweeps.images.report.texts import LEVEL_SHARE

#: The claim to check speaks of encoders at least this wide, and of a speed-up within this range.
WIDE, CLAIMED = 64, (2.0, 3.0)


@dataclass(frozen=True)
class Bounds:
    """Training bounds of A-VI and of F-VI, and the difference F-VI - A-VI, paired by seed."""

    amortized: Mean
    factorized: Mean
    gap: Mean


@dataclass(frozen=True)
class Comparison:
    """The amortized guide `amortized` of `section` and the F-VI of the same protocol."""

    section: Section
    amortized: Arm

    @property
    def protocol(self) -> str:
        return self.amortized.protocol

    @property
    def own(self) -> Arm | None:
        """F-VI from its own start, which is raced with the encoder."""
        return self.section.arm(self.protocol, "F-VI")

    @property
    def final(self) -> Bounds:
        """Where training ended, all rows; F-VI from the best of its starts."""
        return _bounds(self.amortized.each("final", "train", "elbo"), self.section.factorized(self.protocol))

    def equal(self, unit: str) -> Bounds:
        """The highest bounds after the steps or seconds that A-VI's training took, read off the curves."""
        own = self.own.done if self.own else {}
        pairs = {seed: (cell, own[seed]) for seed, cell in self.amortized.done.items() if seed in own}
        ends = {seed: cell.curve[unit][-1] for seed, (cell, _) in pairs.items()}
        amortized, factorized = ({seed: pairs[seed][i].at(unit, ends[seed]) for seed in pairs} for i in (0, 1))
        return _bounds(amortized, factorized)

    def times(self, unit: str) -> tuple[Duration | None, Duration | None]:
        """How long F-VI from its own start and A-VI take to A-VI's final level, in steps or seconds: medians."""
        if self.own is None:
            return None, None
        levels = self._levels()
        return self._median(self.own, levels, unit), self._median(self.amortized, levels, unit)

    def to_the_end(self, unit: str) -> tuple[Duration | None, Duration | None]:
        """How long F-VI, from the best of its starts, and A-VI took in all; a bound where one had not converged."""
        cells = [arm.cells[seed] for seed, arm in self.section.runs(self.protocol).items()]
        return _whole(cells, unit), _whole(list(self.amortized.done.values()), unit)

    @property
    def level(self) -> Mean:
        return mean_over_seeds(Measured(level) for level in self._levels().values())

    def _levels(self) -> dict[int, float]:
        """A-VI's last bound less a share of its lead over the constant guide, by seed; read off curves, as are times."""
        constant = self.section.arm(self.protocol, "constant")
        floor = mean_over_seeds(cell.last for cell in constant.done.values()) if constant else mean_over_seeds(())
        found = {}
        for seed, cell in self.amortized.done.items():
            last = cell.last.value
            lead = last - floor.value if floor.known else 0.0
            found[seed] = last - LEVEL_SHARE * max(lead, 0.0)
        return found

    def _median(self, arm: Arm, levels: dict[int, float], unit: str) -> Duration | None:
        passages: list[Passage] = []
        for seed, level in levels.items():
            passage = arm.cells[seed].passage("elbo", level) if seed in arm.cells else None
            passages += [passage] if passage else []
        return median_duration(passages, unit)


def _bounds(amortized: dict[int, Measured], factorized: dict[int, Measured]) -> Bounds:
    means = (mean_over_seeds(by_seed.values()) for by_seed in (amortized, factorized))
    return Bounds(*means, paired_difference(factorized, amortized))


def _whole(cells: list[CellRecord], unit: str) -> Duration | None:
    """The median over these runs of what all of their training took."""
    runs = [Passage(cell.curve["step"][-1], cell.curve["seconds"][-1], cell.converged is True) for cell in cells]
    return median_duration(runs, unit)


def best_amortized(section: Section, protocol: str, *, least: int = 1) -> Arm | None:
    """The amortized guide of at least this width, failing that the widest, with the highest final training bound."""
    arms = [arm for arm in section.amortized(protocol) if arm.mean("final", "train", "elbo").known]
    eligible = [arm for arm in arms if arm.width >= least] or arms[-1:]
    return max(eligible, key=lambda arm: arm.mean("final", "train", "elbo").value, default=None)


def share_of_the_way(section: Section, protocol: str, bounds: Bounds) -> float | None:
    """A-VI's share of F-VI's lead over the constant guide; None where F-VI has none that can be seen."""
    constant = section.arm(protocol, "constant")
    if constant is None:
        return None
    lead = bounds.factorized.value - constant.mean("final", "train", "elbo").value
    if not lead > 10 * max(bounds.gap.se, constant.mean("final", "train", "elbo").se, 0.0):
        return None
    return 1 - bounds.gap.value / lead


def speed(slow: Duration | None, fast: Duration | None) -> str:
    """The ratio of two medians and whether it is the claimed one.

    >>> speed(Duration(25.0, False), Duration(10.0, False)), speed(Duration(8.0, False), Duration(10.0, False))
    ('2.5: yes', '0.80: no, slower')
    >>> speed(Duration(15.0, True), Duration(10.0, False)), speed(None, Duration(10.0, False))
    ('> 1.5: open', 'unknown')
    """
    ratio = ratio_text(slow, fast)
    if ratio == "unknown":
        return ratio
    value, low, high = slow.value / fast.value, *CLAIMED
    if fast.censored:  # an upper bound
        return f"{ratio}: {'no, slower' if value <= 1 else 'no, less' if value <= low else 'open'}"
    if slow.censored:  # a lower bound
        return f"{ratio}: {'more' if value > high else 'open'}"
    return f"{ratio}: {'no, slower' if value < 1 else 'no, less' if value < low else 'more' if value > high else 'yes'}"
