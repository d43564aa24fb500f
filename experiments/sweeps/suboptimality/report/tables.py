"""The tables of the suboptimality report: bounds and gaps beside the published ones, differences, refinement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from experiments.reporting.statistics import Mean
from experiments.reporting.tables import Column, Table, Value
from experiments.sweeps.suboptimality.report.arms import PARTS, SUMS, Arm, Section, summed

#: Bounds that Cremer et al. (2018) published, of training rows, a small encoder and a diagonal family.
PUBLISHED = {
    "mnist": {"iwae": -89.80, "richer": -90.80, "best": -91.23, "elbo": -92.57},
    "fashionmnist": {"iwae": -97.47, "richer": -98.92, "best": -100.53, "elbo": -104.75},
}
STEPS = (1, 5, 20, 100)


class Line(NamedTuple):
    """Means of one guide on one kind of rows; `arm` is None where they are quoted."""

    label: str
    part: str
    means: Mapping[str, Mean]
    arm: Arm | None = None


def lines(section: Section) -> list[Line]:
    """Every guide, training rows before test rows; then the published guide, if there is one for these data."""
    found = [
        Line(arm.label, part, {name: arm.mean(part, name) for name in SUMS}, arm)
        for arm in section.measured
        for part in PARTS
    ]
    if bounds := PUBLISHED.get(section.settings["dataset"]):
        means = {name: Mean(summed(name, bounds)) for name, sums in SUMS.items() if sums.keys() <= bounds.keys()}
        found.append(Line("Cremer et al., quoted", "train", means))
    return found


def results(section: Section, found: Sequence[Line]) -> Table:
    """The four bounds and the gaps, a line for each guide and kind of rows."""

    def mean(title: str, name: str, show: str = "everywhere") -> Column:
        return Column(title, lambda line: line.means[name], show, text=_two_decimals)

    def of_arm(title: str, value: Callable[[Arm, str], Value], show: str = "csv") -> Column:
        return Column(title, lambda line: None if line.arm is None else value(line.arm, line.part), show)

    columns = [
        *(Column(name, lambda line, name=name: section.settings[name], "csv") for name in ("dataset", "steps")),
        Column("guide", lambda line: line.label),
        Column("rows", lambda line: line.part),
        of_arm("seeds", lambda arm, part: len(arm.done)),
        mean("log p(x), from below", "evidence", "page"),
        mean("L[q**], richer", "richer", "page"),
        mean("L[q*]", "best", "page"),
        mean("L[q]", "elbo", "page"),
        mean("approximation gap", "approximation"),
        mean("amortization gap", "amortization"),
        mean("amortization - approximation", "difference", "csv"),
        mean("inference gap", "inference", "csv"),
        of_arm("not converged", lambda arm, part: sum(map(len, arm.each(part, "not_converged")))),
        of_arm("unreliable", lambda arm, part: sum(map(len, arm.each(part, "unreliable")))),
        of_arm("of rows", lambda arm, part: sum(arm.each(part, "rows"))),
        of_arm("annealing adds", Arm.annealing, "page"),
    ]
    return Table("Bounds and gaps, nats a row ± one standard error", columns, found, file="summary")


def _two_decimals(mean: Mean) -> str:
    """Published numbers have two decimals and no error."""
    return str(mean) if mean.seeds else f"{mean.value:.2f}"


def differences(section: Section) -> Table:
    """Differences between test and training rows, and between guides."""

    def minus(title: str, name: str, part: str, other: Callable[[Arm], Arm | None]) -> Column:
        return Column(title, lambda arm: arm.minus(other(arm), name, part), "page")

    def small(arm: Arm) -> Arm | None:
        return section.arm("small", arm.family)

    def diagonal(arm: Arm) -> Arm | None:
        return section.arm(arm.encoder, "diagonal")

    columns = [
        Column("guide", lambda arm: arm.label, "page"),
        Column("amortization, test - train", lambda arm: arm.generalization, "page"),
        minus("amortization - small encoder's, train", "amortization", "train", small),
        minus("amortization - small encoder's, test", "amortization", "test", small),
        minus("amortization - diagonal family's, train", "amortization", "train", diagonal),
        minus("approximation - diagonal family's, train", "approximation", "train", diagonal),
    ]
    return Table("Differences, row by row", columns, section.measured, file="differences")


def refinement(section: Section) -> Table:
    """The share of the amortization gap that steps from the encoder's output close, and the seconds of all rows."""

    def closed(steps: int, pair: tuple[Arm, str]) -> Mean:
        return pair[0].closed(pair[1], steps)

    def seconds(steps: int, pair: tuple[Arm, str]) -> float:
        return float(pair[0].refined(pair[1], steps, "seconds").mean())

    columns = [Column("guide", lambda pair: pair[0].label, "csv"), Column("rows", lambda pair: pair[1], "csv")]
    columns += [Column(f"{n} step{'s' * (n > 1)}", partial(closed, n), "csv") for n in STEPS]
    columns += [Column(f"s of {n}", partial(seconds, n), "csv") for n in STEPS]
    pairs = [(arm, part) for arm in section.measured for part in PARTS]
    return Table("Refinement", columns, pairs, file="refinement")
