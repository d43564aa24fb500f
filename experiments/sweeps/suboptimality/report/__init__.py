"""The report of the sweep `suboptimality`: what family and encoder of a variational autoencoder cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import Curve, Panel, curves, dots, ramp
from experiments.sweeps.suboptimality.report.arms import PARTS, Arm, Section, read
from experiments.sweeps.suboptimality.report.tables import STEPS, Line, differences, lines, refinement, results

__all__ = ["document"]

QUOTED = 20
READING = """
Approximation gap: log p(x) - L[q*]; amortization gap: L[q*] - L[q]. L[q] is the guide's ELBO, q* the best factor of its family
for each row, q** of a richer one. log p(x) is bounded from below, by importance weights or by annealing, and so is its gap.
Unreliable: rows whose importance weights have too heavy a tail (k-hat).

Errors speak of other rows and other seeds; with one seed they say nothing of its luck. Images are made binary once.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found = read(records)
    return Document(
        title="Inference suboptimality in variational autoencoders",
        lead="What a family that does not hold the posterior costs (approximation), and an encoder that does not find the "
        "family's best member (amortization); after Cremer, Li and Duvenaud (2018).",
        notes=[_answer(section) for section in found],
        parts=[*(_part(section) for section in found), Document("How to read this", READING)],
    )


def _answer(section: Section) -> Note:
    """Of the first guide: which gap is larger, and what steps of refinement close."""
    if not section.measured:
        return Note("warning", "Every cell diverged.", section.title)
    arm = section.measured[0]
    order = {1: ">", 0: "≈", -1: "<"}[arm.mean("train", "difference").sign]
    closed = arm.closed("test", QUOTED)
    text = (
        f"{arm.label.capitalize()}: amortization gap {arm.mean('train', 'amortization')} {order} approximation gap "
        f"{arm.mean('train', 'approximation')} nats a training row"
    )
    if closed.known:
        text += f"; {QUOTED} steps of refinement close {closed.value:.0%} ± {closed.se:.0%} of that of test rows"
    return Note("answer", f"{text}.", section.title)


def _part(section: Section) -> Document:
    """One section of the report."""
    s, found = section.settings, lines(section)
    lead = (
        f"{s['num_train']:,} training images, {s['latent_dim']} latents, a decoder of two layers of {s['hidden_dim']}; gaps of "
        f"{s['rows']:,} training and test rows by {s['num_samples']:,} draws, {s['ais_rows']:,} of them annealed too."
    )
    part = Document(section.title, lead, list(_warnings(section)), name=f"{s['dataset']}-{s['steps']}")
    if not section.measured:
        return part
    error = "± one standard error."
    shown = [
        Figure("gaps", "Gaps by encoder and family", error, partial(dots, *_gaps(found), "nats a row")),
        Figure("refinement", "Refinement", error, partial(curves, [_shares(section.measured)], low=-10.0)),
    ]
    return replace(part, tables=[results(section, found), differences(section), refinement(section)], figures=shown)


def _gaps(found: Sequence[Line]) -> tuple[list[str], dict[str, list[tuple[float, float, float]]]]:
    """The gaps of every line with their intervals, and what each line is called."""
    names = {"amortization": "amortization gap", "approximation": "approximation gap", "closed": "of it closed by q**"}
    series = {
        title: [(m.value, m.value - m.se, m.value + m.se) for m in (line.means[name] for line in found)]
        for name, title in names.items()
    }
    return [f"{line.label}, {line.part}" for line in found], series


def _shares(arms: Sequence[Arm]) -> list[Panel]:
    """The share of the amortization gap that refinement closes by its steps, a panel for each kind of rows."""
    panels = []
    for part in PARTS:
        shares = [[arm.closed(part, steps) for steps in STEPS] for arm in arms]
        percents = [[[100 * value for value in (each.value, each.se)] for each in of_arm] for of_arm in shares]
        found = zip(arms, ramp(len(arms)), percents, strict=True)
        drawn = [Curve(arm.label, colour, STEPS, *zip(*percent, strict=True)) for arm, colour, percent in found]
        panels.append(Panel("steps of refinement", "% of the amortization gap closed", drawn, f"{part} rows", 100.0))
    return panels


def _warnings(section: Section) -> Iterator[Note]:
    """What the numbers rest on: rows that have converged, evidence that holds, latents in use, seeds that did not diverge."""
    every = [(arm, part) for arm in section.measured for part in PARTS]
    rows = sum(sum(arm.each(part, "rows")) for arm, part in every)
    late, heavy = (
        sum(len(each) for arm, part in every for each in arm.each(part, name))
        for name in ("not_converged", "unreliable")
    )
    unused = [arm.label for arm in section.measured if arm.mean("train", "above the mean image").sign < 1]
    lost = [f"{arm.label}, seed {seed}" for arm in section.arms for seed in arm.records if seed not in arm.done]
    found = {
        "Rows that have not converged": f"{late:,} of {rows:,}: their amortization gap is a bound from below."
        * bool(late),
        "Rows of unreliable evidence": f"{heavy:,} of {rows:,}: their approximation gap is a loose bound."
        * bool(heavy),
        "Latents are not used": "; ".join(unused),
        "Diverged, left out": "; ".join(lost),
    }
    yield from (Note("warning", text, title) for title, text in found.items() if text)
