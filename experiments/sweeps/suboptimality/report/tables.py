"""The tables of the suboptimality report: bounds and gaps beside the published ones, differences, refinement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.reporting.statistics import Mean
from experiments.reporting.tables import Column, Table, Value
from experiments.sweeps.suboptimality.report.arms import SUMS, Arm, Section, summed
from experiments.sweeps.suboptimality.report.rows import mean_between

#: Bounds that Cremer et al. (2018) published, of training rows, a small encoder and a diagonal family.
PUBLISHED = {
    "mnist": {"iwae": -89.80, "richer": -90.80, "best": -91.23, "elbo": -92.57},
    "fashionmnist": {"iwae": -97.47, "richer": -98.92, "best": -100.53, "elbo": -104.75},
}
STEPS = (1, 5, 20, 100)


class Line(NamedTuple):
    """Means of one guide on one kind of rows; `arm` is None where they are quoted."""

    guide: str
    part: str
    means: Mapping[str, Mean]
    arm: Arm | None = None


def lines(section: Section) -> list[Line]:
    """Every guide, then the published one, if there is one for these data."""
    found = [Line(arm.guide, arm.part, {name: arm.mean(name) for name in SUMS}, arm) for arm in section.arms]
    if bounds := PUBLISHED.get(section.settings["dataset"]):
        means = {name: Mean(summed(name, bounds)) for name, sums in SUMS.items() if sums.keys() <= bounds.keys()}
        found.append(Line("Cremer et al., quoted", "train", means))
    return found


def results(section: Section, found: Sequence[Line]) -> Table:
    """The four bounds and the gaps, a line for each guide and kind of rows."""

    def mean(title: str, name: str, show: str = "everywhere") -> Column:
        return Column(title, lambda line: line.means[name], show, text=_two_decimals)

    def of_arm(title: str, value: Callable[[Arm], Value], show: str = "csv") -> Column:
        return Column(title, lambda line: None if line.arm is None else value(line.arm), show)

    columns = [
        *(Column(name, lambda line, name=name: section.settings[name], "csv") for name in ("dataset", "steps")),
        Column("guide", "guide"),
        Column("rows", "part"),
        of_arm("seeds", lambda arm: len(arm.results)),
        mean("log p(x), from below", "evidence", "page"),
        mean("L[q**], richer", "richer", "page"),
        mean("L[q*]", "best", "page"),
        mean("L[q]", "elbo", "page"),
        mean("approximation gap", "approximation"),
        mean("amortization gap", "amortization"),
        mean("amortization - approximation", "difference", "csv"),
        mean("inference gap", "inference", "csv"),
        of_arm("not converged", lambda arm: arm.count("not_converged")),
        of_arm("unreliable", lambda arm: arm.count("unreliable")),
        of_arm("of rows", lambda arm: sum(arm.each("rows"))),
        of_arm("annealing adds", lambda arm: arm.annealing, "page"),
    ]
    return Table("Bounds and gaps, nats a row ± one standard error", columns, found, file="summary")


def _two_decimals(mean: Mean) -> str:
    """Published numbers have two decimals and no error."""
    return str(mean) if mean.seeds else f"{mean.value:.2f}"


def differences(section: Section) -> Table:
    """Differences between test and training rows, and between guides."""

    def pair(arm: Arm, rows: str, **other: str) -> list[Arm | None]:
        keys = {"encoder": arm.encoder, "family": arm.family, "part": rows}
        return [section.arm(**keys), section.arm(**keys | other)]

    def minus(title: str, name: str, part: str, **other: str) -> Column:
        return Column(title, lambda arm: Arm.minus(*pair(arm, part, **other), name), "page")

    def generalization(arm: Arm) -> Mean:
        return mean_between(*(each.rows("amortization") for each in pair(arm, "test", part="train")))

    columns = [
        Column("guide", "guide", "page"),
        Column("amortization, test - train", generalization, "page"),
        minus("amortization - small encoder's, train", "amortization", "train", encoder="small"),
        minus("amortization - small encoder's, test", "amortization", "test", encoder="small"),
        minus("amortization - diagonal family's, train", "amortization", "train", family="diagonal"),
        minus("approximation - diagonal family's, train", "approximation", "train", family="diagonal"),
    ]
    return Table(
        "Differences, row by row", columns, [arm for arm in section.arms if arm.part == "train"], file="differences"
    )


def refinement(section: Section) -> Table:
    """The share of the amortization gap that steps from the encoder's output close, and the seconds of all rows."""
    columns = [Column("guide", "guide", "csv"), Column("rows", "part", "csv")]
    columns += [Column(f"{n} step{'s' * (n > 1)}", lambda arm, n=n: arm.closed(n), "csv") for n in STEPS]
    columns += [Column(f"s of {n}", lambda arm, n=n: float(arm.refined(n, "seconds").mean()), "csv") for n in STEPS]
    return Table("Refinement", columns, section.arms, file="refinement")
