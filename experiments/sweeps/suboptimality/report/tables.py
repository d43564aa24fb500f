"""The tables of the suboptimality report: bounds and gaps beside the published ones, comparisons, refinement."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from experiments.reporting.statistics import Mean
from experiments.reporting.tables import Column, Table, Value, percent
from experiments.sweeps.suboptimality.report.arms import PARTS, Arm, Section, generalization, paired

PUBLISHED = "Cremer et al."
#: Published bounds by data set, of training rows, a small encoder and a diagonal family, in nats a row.
PUBLISHED_BOUNDS = {
    "mnist": {"evidence": -89.80, "richer": -90.80, "best": -91.23, "elbo": -92.57},
    "fashionmnist": {"evidence": -97.47, "richer": -98.92, "best": -100.53, "elbo": -104.75},
}
STEPS = (1, 5, 20, 100)


class Line(NamedTuple):
    """Means of one guide on one kind of rows; `arm` is None where they are quoted."""

    label: str
    part: str
    means: dict[str, Mean]
    arm: Arm | None = None


def lines(section: Section) -> list[Line]:
    """Every guide, training rows before test rows."""
    return [Line(arm.label, part, arm.means(part), arm) for arm in section.measured for part in PARTS]


def published(dataset: str) -> list[Line]:
    """The published line of a data set, if there is one."""
    if dataset not in PUBLISHED_BOUNDS:
        return []
    bounds = PUBLISHED_BOUNDS[dataset]
    gaps = {"approximation": bounds["evidence"] - bounds["best"], "amortization": bounds["best"] - bounds["elbo"]}
    gaps |= {"inference": sum(gaps.values()), "difference": gaps["amortization"] - gaps["approximation"]}
    return [Line(f"{PUBLISHED}, small, diag.", "train", {name: Mean(value) for name, value in (bounds | gaps).items()})]


def results(section: Section) -> Table:
    """The four bounds and the gaps, a line for each guide and kind of rows, the published ones below."""

    def of_arm(value: Callable[[Arm, str], Value]) -> Callable[[Line], Value]:
        return lambda line: None if line.arm is None else value(line.arm, line.part)

    def mean(name: str) -> Callable[[Line], Value]:
        return lambda line: line.means.get(name)

    columns = [
        *(Column(name, lambda line, name=name: section.settings[name], "csv") for name in ("dataset", "steps")),
        Column("guide", lambda line: line.label),
        Column("rows", lambda line: line.part),
        Column("seeds", of_arm(lambda arm, part: len(arm.done)), "csv"),
        *(Column(title, mean(name), "page", text=two_decimals) for title, name in (
            ("log p(x), from below", "evidence"), ("L[q**], richer", "richer"), ("L[q*]", "best"), ("L[q]", "elbo"))),
        Column("approximation gap", mean("approximation"), text=two_decimals),
        Column("amortization gap", mean("amortization"), text=two_decimals),
        Column("amortization - approximation", mean("difference"), "csv"),
        Column("inference gap", mean("inference"), "csv"),
        Column("not converged", of_arm(lambda arm, part: arm.flagged(part, "not_converged")), "page"),
        Column("unreliable", of_arm(lambda arm, part: arm.flagged(part, "unreliable")), "page"),
        Column("of rows", of_arm(lambda arm, part: sum(arm.each(part, "rows"))), "csv"),
        Column("annealing adds", of_arm(lambda arm, part: arm.annealing(part)), "page"),
    ]  # fmt: skip
    quoted = published(section.settings["dataset"])
    note = (
        "Nats a row ± one standard error over rows and seeds. q*: the best factor of the guide's own family; q**: of a normal "
        "with full covariance, or of a flow where the guide's name says so."
    )
    if quoted:
        note += (
            f" {PUBLISHED}: published in 2018 after 3,280 epochs, quoted, not measured here; their q** is a flow, and "
            "their binary images are other ones."
        )
    return Table("Bounds and gaps", columns, [*lines(section), *quoted], note, file="summary")


def comparisons(section: Section) -> Table:
    """Differences between guides, and between test and training rows."""
    columns = [
        Column("guide", lambda arm: arm.label, "page"),
        Column("amortization, test - train", generalization, "page"),
        *(Column(f"amortization - small encoder's, {part}", lambda arm, part=part: paired(
            arm, section.arm("small", arm.family), "amortization", part), "page") for part in PARTS),
        *(Column(f"{gap} - diagonal family's, train", lambda arm, gap=gap: paired(
            arm, section.arm(arm.encoder, "diagonal"), gap, "train"), "page") for gap in ("amortization", "approximation")),
    ]  # fmt: skip
    note = "Nats a row ± one standard error, row by row. Guides have their own decoders; one seed says nothing of its luck."
    return Table("Differences", columns, section.measured, note, file="differences")


def refinement(section: Section) -> Table:
    """The share of the amortization gap that steps from the encoder's output close, and their seconds."""
    columns = [
        Column("guide", lambda line: line.label),
        Column("rows", lambda line: line.part),
        *(Column(f"{steps} step{'s' * (steps > 1)}", lambda line, steps=steps: line.arm.closed(line.part, steps), text=percent)
          for steps in STEPS),
        *(Column(f"s of {steps}", lambda line, steps=steps: line.arm.seconds(line.part, steps), "page") for steps in STEPS),
    ]  # fmt: skip
    note = (
        "Share of the amortization gap ± one standard error, and the seconds of all measured rows together. A row that its "
        "steps made worse keeps the encoder's output, but that is judged by few draws, so a share may be negative."
    )
    return Table("Refinement from the encoder's output", columns, lines(section), note, file="refinement")


def two_decimals(mean: Mean | None) -> str:
    """Published numbers have two decimals and no error."""
    return "" if mean is None else f"{mean.value:.2f}" if mean.known and not mean.seeds else str(mean)
