"""The report of the sweep `suboptimality`: what family and encoder of a variational autoencoder cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from experiments.reporting.document import Document, Figure, Note, reading
from experiments.reporting.statistics import SEEN
from experiments.reporting.tables import percent
from experiments.sweeps.suboptimality.report import figures, tables
from experiments.sweeps.suboptimality.report.arms import PARTS, Section, read

__all__ = ["document"]

_QUOTED_STEPS = 20
READING = f"""
Inference gap = approximation gap, log p(x) - L[q*], + amortization gap, L[q*] - L[q]. L[q] is the guide's bound (ELBO),
L[q*] that of the best factor of its family for each row, L[q**] of a richer family, each found by Adam from the encoder's
output, from the mean of the outputs and from a standard normal. Bounds are measured by fresh draws, common to all.

The evidence is the importance-weighted bound of the best factor; where annealed importance sampling of the first rows is
the better bound in their mean, its lead there is added. It is a bound from below, so the approximation gap is one too.
Unreliable: rows whose importance weights have too heavy a tail (k-hat).

Errors speak of other rows and other seeds: se = sqrt(var_n m_n / R + var_s m_s / S), m_n the mean of a row over S seeds,
m_s that of a seed over R rows; with one seed the second term is unknown and left out. A difference counts from {SEEN:g} of
them on.

Images are made binary once; the published binary MNIST is another draw. Refinement: Adam at .01, the mean of the second
half of the steps taken.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found = read(records)
    nothing = Note("warning", "Every cell of the store diverged.", "Nothing to show")
    return Document(
        title="Inference suboptimality in variational autoencoders",
        lead="Evidence is lost to a family that does not hold the posterior (approximation) and to an encoder that does not "
        "find the family's best member (amortization). Is the second loss the larger one (Cremer, Li and Duvenaud, 2018)?",
        notes=[_answer(section) for section in found if section.measured] or [nothing],
        parts=[
            *(_part(section) for section in found),
            reading(READING),
        ],
    )


def _answer(section: Section) -> Note:
    """Of the first guide: which gap is larger, and what steps of refinement close."""
    arm = section.measured[0]
    means = arm.means("train")
    verdict = {1: "larger than", 0: "not told apart from", -1: "smaller than"}[means["difference"].sign]
    text = (
        f"{arm.label.capitalize()}: on training rows the amortization gap, {means['amortization']} nats, is {verdict} the "
        f"approximation gap, {means['approximation']}; on test rows {_QUOTED_STEPS} steps of refinement close "
        f"{percent(arm.closed('test', _QUOTED_STEPS))} of the amortization gap."
    )
    return Note("answer", text, section.title)


def _part(section: Section) -> Document:
    """One section of the report."""
    s = section.settings
    lead = (
        f"{s['num_train']:,} training images, minibatches of {s['batch_size']}, KL divergence weighed up over {s['warm_up']:,} "
        f"steps; {s['latent_dim']} latents, decoder of two layers of {s['hidden_dim']}. Gaps of the first {s['rows']:,} "
        f"training and test rows by {s['num_samples']:,} draws; the first {s['ais_rows']:,} annealed too."
    )
    caption = (
        "Thin bars: one standard error, left of the amortization gap, right of the whole, which is a bound from below."
    )
    share = (
        "Share of the amortization gap that steps close, each number a run of its own. Dashed: the best factor found."
    )
    shown = [
        Figure("gaps", "Gaps by encoder and family", caption, partial(figures.gaps, section)),
        Figure("refinement", "Refinement from the encoder's output", share, partial(figures.refinement, section)),
    ]
    made = [tables.results(section), tables.comparisons(section), tables.refinement(section)]
    name = f"{s['dataset']}-{s['steps']}"
    if not section.measured:
        return Document(section.title, lead, list(_warnings(section)), name=name)
    return Document(section.title, lead, list(_warnings(section)), made, shown, name=name)


def _warnings(section: Section) -> Iterator[Note]:
    """What the numbers rest on: latents in use, rows that have converged, evidence that holds, seeds that did not diverge."""
    for arm in section.measured:
        gained = arm.with_evidence("train", arm.bound("train", "iwae") - arm.bound("train", "mean_image"))
        if gained.sign < 1:
            text = f"The evidence is {gained} nats above that of the mean image: gaps near zero mean nothing here."
            yield Note("warning", text, f"Latents that are not used: {arm.label}")
    every = [(arm, part) for arm in section.measured for part in PARTS]
    for name, title, gap in (
        ("not_converged", "Rows that have not converged", "amortization gap is a bound from below"),
        ("unreliable", "Rows whose evidence is unreliable", "approximation gap is a bound from below, and a loose one"),
    ):
        if count := sum(arm.flagged(part, name) for arm, part in every):
            rows = sum(sum(arm.each(part, "rows")) for arm, part in every)
            yield Note("warning", f"{count:,} of {rows:,}, by guide in the table: their {gap}.", title)
    if any(raised and raised.sign > 0 for raised in (arm.annealing(part) for arm, part in every)):
        text = "It raises the evidence of some guides: without it their approximation gaps would be too small."
        yield Note("warning", text, "Annealing")
    for arm in section.arms:
        if late := sorted(set(arm.records) - set(arm.done)):
            yield Note(
                "warning", f"Seeds {', '.join(map(str, late))}; left out of all means.", f"Diverged: {arm.label}"
            )
