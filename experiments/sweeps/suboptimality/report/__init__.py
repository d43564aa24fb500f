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
    if not section.arms:
        return Note("warning", "Every cell diverged.", section.title)
    train, test, *_ = section.arms
    order = {1: ">", 0: "≈", -1: "<"}[train.mean("difference").sign]
    closed = test.closed(QUOTED)
    text = (
        f"{train.guide.capitalize()}: amortization gap {train.mean('amortization')} {order} approximation gap "
        f"{train.mean('approximation')} nats a training row"
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
    if not section.arms:
        return part
    error = "± one standard error."
    shown = [
        Figure("gaps", "Gaps by encoder and family", error, partial(dots, *_gaps(found), "nats a row")),
        Figure("refinement", "Refinement", error, partial(curves, [_shares(section.arms)], low=-10.0)),
    ]
    return replace(part, tables=[results(section, found), differences(section), refinement(section)], figures=shown)


def _gaps(found: Sequence[Line]) -> tuple[list[str], dict[str, list[tuple[float, float, float]]]]:
    """The gaps of every line with their intervals, and what each line is called."""
    names = {"amortization": "amortization gap", "approximation": "approximation gap", "closed": "of it closed by q**"}
    series = {
        title: [(m.value, m.value - m.se, m.value + m.se) for m in (line.means[name] for line in found)]
        for name, title in names.items()
    }
    return [f"{line.guide}, {line.part}" for line in found], series


def _shares(arms: Sequence[Arm]) -> list[Panel]:
    """The share of the amortization gap that refinement closes by its steps, a panel for each kind of rows."""
    guides = list(dict.fromkeys(arm.guide for arm in arms))
    colours = dict(zip(guides, ramp(len(guides)), strict=True))
    panels = []
    for part in PARTS:
        drawn = []
        for arm in (arm for arm in arms if arm.part == part):
            shares = [arm.closed(steps) for steps in STEPS]
            values, errors = ([100 * getattr(each, name) for each in shares] for name in ("value", "se"))
            drawn.append(Curve(arm.guide, colours[arm.guide], STEPS, values, errors))
        panels.append(Panel("steps of refinement", "% of the amortization gap closed", drawn, f"{part} rows", 100.0))
    return panels


def _warnings(section: Section) -> Iterator[Note]:
    """What the numbers rest on: rows that have converged, evidence that holds, latents in use, seeds that did not diverge."""
    rows = sum(sum(arm.each("rows")) for arm in section.arms)
    late, heavy = (sum(arm.count(name) for arm in section.arms) for name in ("not_converged", "unreliable"))
    unused = [arm.guide for arm in section.arms if arm.part == "train" and arm.mean("above the mean image").sign < 1]
    found = {
        "Rows that have not converged": f"{late:,} of {rows:,}: their amortization gap is a bound from below"
        if late
        else "",
        "Rows of unreliable evidence": f"{heavy:,} of {rows:,}: their approximation gap is a loose bound"
        if heavy
        else "",
        "Latents are not used": "; ".join(unused),
        "Diverged, left out": "; ".join(section.diverged),
    }
    yield from (Note("warning", text, title) for title, text in found.items() if text)
