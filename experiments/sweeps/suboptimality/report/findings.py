"""What the numbers of one data set say, in sentences computed from the records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from experiments.reporting.document import Finding
from experiments.reporting.statistics import Mean, significant, with_error
from experiments.sweeps.suboptimality.report.sections import (
    ENCODERS,
    FAMILIES,
    PARTS,
    Arm,
    Section,
    generalization,
    mean_of_rows,
    paired,
    share,
)
from experiments.sweeps.suboptimality.report.tables import annealing, measured, percent

_QUOTED_STEPS = 20


def headline(found: Sequence[Section]) -> list[Finding]:
    """The first guide of every section: which gap is larger, and what its steps of refinement close."""
    return [
        Finding("result", section.title, f"{_larger(section.measured[0])} {_closed(section.measured[0], 'test')}")
        for section in found
        if section.measured
    ]


def findings(section: Section) -> list[Finding]:
    """All that is said of one section."""
    said = [Finding("result", f"Which gap is larger: {arm.label}", _larger(arm)) for arm in section.measured]
    return [*said, *_sizes(section), *_families(section), *_held_out(section), *_refined(section), *_flags(section)]


def _larger(arm: Arm) -> str:
    of = measured(arm, "train")
    difference = arm.with_evidence("train", arm.amortization("train") - arm.approximation("train"), sign=-1)
    verdict = {1: "larger than", 0: "not told apart from", -1: "smaller than"}[difference.sign]
    return (
        f"{arm.label.capitalize()}: on training rows the amortization gap, {with_error(of['amortization'])} nats, is {verdict} "
        f"the approximation gap, {with_error(of['approximation'])} (difference {with_error(difference)}, row by row)."
    )


def _changed(difference: Mean) -> str:
    return f"{ {1: 'larger', 0: 'not told apart', -1: 'smaller'}[difference.sign] } ({with_error(difference)} nats)"


def _sizes(section: Section) -> Iterator[Finding]:
    """Against the small encoder, one finding an encoder."""
    for encoder in ENCODERS[1:]:
        said = []
        for family in FAMILIES:
            one, small = section.arm(encoder, family), section.arm("small", family)
            words = _compared(one, small, *(lambda arm, part=part: arm.amortization(part) for part in PARTS))
            if words:
                said.append(f"{family} family: {words[0]} on training rows, {words[1]} on test rows")
        if said:
            text = f"Amortization gap against that of the small encoder, each with its own decoder. {'; '.join(said)}."
            yield Finding("result", f"The {encoder} encoder", text)


def _families(section: Section) -> Iterator[Finding]:
    """Against the diagonal family, one finding a family."""
    for family in FAMILIES[1:]:
        said = []
        for encoder in ENCODERS:
            one, diagonal = section.arm(encoder, family), section.arm(encoder, "diagonal")
            words = _compared(
                one, diagonal, lambda arm: arm.approximation("train"), lambda arm: arm.amortization("train")
            )
            if words:
                said.append(f"{encoder} encoder: approximation {words[0]}, amortization {words[1]}")
        if said:
            text = f"Gaps of training rows against those of the diagonal family, each with its own decoder. {'; '.join(said)}."
            yield Finding("result", f"The {family} family", text)


def _compared(one: Arm | None, other: Arm | None, *gaps: Callable[[Arm], np.ndarray]) -> list[str]:
    """How each gap of one differs from the other's; nothing where it is not known."""
    if one is None or other is None:
        return []
    changes = [paired(one, other, gap) for gap in gaps]
    if not changes[0].known:
        return []
    return [_changed(change) for change in changes]


def _held_out(section: Section) -> Iterator[Finding]:
    said = [f"{arm.label}: {_changed(generalization(arm))}" for arm in section.measured]
    if said:
        yield Finding("result", "Test rows", f"Amortization gap against that of training rows. {'; '.join(said)}.")


def _refined(section: Section) -> Iterator[Finding]:
    if section.measured:
        text = " ".join(_closed(arm, part) for arm in section.measured for part in PARTS)
        yield Finding("result", "Refinement", text)


def _closed(arm: Arm, part: str) -> str:
    closed = share(arm.gain(part, _QUOTED_STEPS), arm.amortization(part))
    rows, seconds = arm.rows(part) // max(1, len(arm.done)), arm.seconds(part, _QUOTED_STEPS)
    return (
        f"{_QUOTED_STEPS} steps from the {arm.encoder} encoder's output ({arm.family}) close {percent(closed)} of the gap "
        f"of {rows:,} {part} rows in {significant(seconds, 2)} s."
    )


def _flags(section: Section) -> Iterator[Finding]:
    """What the numbers rest on: rows that have not converged, evidence that hangs on few draws, annealing, divergence."""
    for arm in section.measured:
        gained = arm.with_evidence("train", arm.bound("train", "iwae") - arm.bound("train", "mean_image"))
        if gained.sign < 1:
            text = f"The evidence is {with_error(gained)} nats above that of the mean image: gaps near zero mean nothing here."
            yield Finding("warning", f"Latents that are not used: {arm.label}", text)
    for name, title, meaning in (
        ("not_converged", "Rows that have not converged", "their amortization gap is a bound from below"),
        (
            "unreliable",
            "Rows whose evidence is unreliable",
            "their approximation gap is a bound from below, and a loose one",
        ),
    ):
        counts = [
            f"{arm.label}, {part}: {arm.flagged(part, name):,} of {arm.rows(part):,}"
            for arm in section.measured
            for part in PARTS
            if arm.flagged(part, name)
        ]
        kind, text = ("warning", f"{'; '.join(counts)}: {meaning}.") if counts else ("check", "None.")
        if section.measured:
            yield Finding(kind, title, text)
    annealed = [(arm, part) for arm in section.measured for part in PARTS if annealing(arm, part) != "not run"]
    if annealed:
        text = "; ".join(f"{arm.label}, {part}: {annealing(arm, part)}" for arm, part in annealed)
        higher = any(_change(arm, part).sign > 0 for arm, part in annealed)
        text = f"Annealed minus importance-weighted bound, nats a row. {text}."
        yield Finding("warning" if higher else "check", "Annealing", text)
    for arm in section.arms:
        late = sorted(set(arm.cells) - set(arm.done))
        if late:
            yield Finding(
                "warning", f"Diverged: {arm.label}", f"Seeds {', '.join(map(str, late))}; left out of all means."
            )


def _change(arm: Arm, part: str) -> Mean:
    rows = arm.bound(part, "ais")
    return mean_of_rows(rows - arm.bound(part, "iwae")[:, : rows.shape[1]])
