"""The tables of the suboptimality report: bounds and gaps beside the published ones, and refinement."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.reporting.document import Table, Value
from experiments.reporting.statistics import Mean, significant, with_error
from experiments.sweeps.suboptimality.report.sections import PARTS, TITLES, Arm, Section, mean_of_rows, share

PUBLISHED = "Cremer et al."
#: Published bounds by data set, of training rows, a small encoder and a diagonal family, in nats a row.
PUBLISHED_BOUNDS = {
    "mnist": {"evidence": -89.80, "richer": -90.80, "best": -91.23, "elbo": -92.57},
    "fashionmnist": {"evidence": -97.47, "richer": -98.92, "best": -100.53, "elbo": -104.75},
}
STEPS = (1, 5, 20, 100)

_BOUNDS = ["log p(x), from below", "L[q**], richer", "L[q*]", "L[q]"]
_GAPS = ["approximation gap", "amortization gap"]


def measured(arm: Arm, part: str) -> dict[str, Mean]:
    """All bounds and gaps of a guide, by name."""
    best, approximation, amortization = arm.bound(part, "best"), arm.approximation(part), arm.amortization(part)
    return {
        "evidence": arm.with_evidence(part, arm.bound(part, "iwae")),
        "richer": mean_of_rows(arm.bound(part, "richer")),
        "best": mean_of_rows(best),
        "elbo": mean_of_rows(arm.bound(part, "elbo")),
        "approximation": arm.with_evidence(part, approximation),
        "closed": mean_of_rows(arm.bound(part, "richer") - best),
        "amortization": mean_of_rows(amortization),
        "inference": arm.with_evidence(part, approximation + amortization),
    }


def published_gaps(dataset: str) -> dict[str, float] | None:
    bounds = PUBLISHED_BOUNDS.get(dataset)
    if bounds is None:
        return None
    return {
        "approximation": bounds["evidence"] - bounds["best"],
        "amortization": bounds["best"] - bounds["elbo"],
    }


def results(section: Section) -> Table:
    """The four bounds and the gaps, a line for each guide and kind of rows, the published ones below."""
    header = ["guide", "rows", *_BOUNDS, *_GAPS, "not converged", "evidence unreliable", "annealing adds"]
    lines = []
    for arm in section.measured:
        for part in PARTS:
            of = measured(arm, part)
            flags = [f"{arm.flagged(part, name):,} of {arm.rows(part):,}" for name in ("not_converged", "unreliable")]
            bounds = [with_error(of[name]) for name in ("evidence", "richer", "best", "elbo")]
            gaps = [with_error(of[name]) for name in ("approximation", "amortization")]
            lines.append([arm.label, part, *bounds, *gaps, *flags, annealing(arm, part)])
    dataset = section.settings["dataset"]
    if dataset in PUBLISHED_BOUNDS:
        bounds = [f"{PUBLISHED_BOUNDS[dataset][name]:.2f}" for name in ("evidence", "richer", "best", "elbo")]
        gaps = [f"{gap:.2f}" for gap in published_gaps(dataset).values()]
        lines.append([f"{PUBLISHED}, small, diagonal", "train", *bounds, *gaps, "", "", ""])
    note = (
        "Nats a row, ± one standard error over rows and seeds. q* is the best factor of the guide's own family; q** of a "
        "normal with full covariance, or of a flow where the guide's name says so."
    )
    if dataset in PUBLISHED_BOUNDS:
        note += (
            f" {PUBLISHED}: published in 2018 after 3,280 epochs, quoted, not measured here; their q** is a flow, and "
            "their binary images are other ones."
        )
    return Table("Bounds and gaps", header, lines, note, brief=["guide", "rows", *_BOUNDS, *_GAPS])


def annealing(arm: Arm, part: str) -> str:
    """What annealing says about the evidence of the rows that were annealed."""
    annealed = [of["bounds"]["ais"] for of in arm.part(part)]
    if any(rows is None for rows in annealed):
        return "not run"
    rows = arm.bound(part, "ais")
    change = mean_of_rows(rows - arm.bound(part, "iwae")[:, : rows.shape[1]])
    return f"{with_error(change)} in {rows.shape[1]} rows"


def refinement(section: Section) -> Table:
    """The share of the amortization gap that steps from the encoder's output close, and their seconds."""
    header = ["guide", "rows", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS), "seconds"]
    lines = []
    for arm in section.measured:
        for part in PARTS:
            shares = [share(arm.gain(part, steps), arm.amortization(part)) for steps in STEPS]
            seconds = " / ".join(significant(arm.seconds(part, steps), 2) for steps in STEPS)
            lines.append([arm.label, part, *map(percent, shares), seconds])
    note = (
        "Share of the amortization gap ± one standard error, and the seconds of all measured rows together. A row that "
        "its steps made worse keeps the encoder's output, but that is judged by few draws, so a share may be negative."
    )
    return Table("Refinement from the encoder's output", header, lines, note, brief=header)


def percent(mean: Mean) -> str:
    """ "43% ± 2%".

    >>> percent(Mean(0.432, 0.018, 1)), percent(Mean(math.nan, math.nan, 0))
    ('43% ± 2%', '-')
    """
    return f"{mean.value:.0%} ± {mean.se:.0%}" if mean.known else "-"


def overview(found: Sequence[Section]) -> Table:
    """Training rows alone, all data sets."""
    lines = []
    for section in found:
        dataset = section.settings["dataset"]
        for arm in section.measured:
            of = measured(arm, "train")
            gaps = [with_error(of[name]) for name in ("approximation", "amortization")]
            lines.append([TITLES.get(dataset, dataset), f"{section.settings['steps']:,}", arm.label, *gaps])
    for dataset in dict.fromkeys(section.settings["dataset"] for section in found):
        if gaps := published_gaps(dataset):
            quoted = [f"{gap:.2f}" for gap in gaps.values()]
            lines.append([TITLES[dataset], "1,968,000", f"{PUBLISHED}, small, diagonal", *quoted])
    return Table("Gaps of training rows", ["data", "steps", "guide", *_GAPS], lines, "Nats a row ± one standard error.")


def csv_lines(found: Sequence[Section]) -> list[dict[str, Value]]:
    """Every mean of every guide, with its error."""
    lines = []
    for section in found:
        for arm in section.measured:
            for part in PARTS:
                line = {"dataset": section.settings["dataset"], "steps": section.settings["steps"]}
                line |= {"encoder": arm.encoder, "family": arm.family, "rows": part, "seeds": len(arm.done)}
                for name, mean in measured(arm, part).items():
                    line |= {name: _number(mean.value), f"{name}_se": _number(mean.se)}
                for steps in STEPS:
                    of = share(arm.gain(part, steps), arm.amortization(part))
                    line |= {f"share_{steps}": _number(of.value), f"share_{steps}_se": _number(of.se)}
                    line |= {f"seconds_{steps}": _number(arm.seconds(part, steps))}
                line |= {name: arm.flagged(part, name) for name in ("not_converged", "unreliable")}
                lines.append(line)
    return lines


def _number(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None
