"""The report of the sweep `suboptimality`: what family and encoder of a variational autoencoder cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from experiments.reporting.document import Document, Figure, Finding, made_by
from experiments.reporting.document import Section as Part
from experiments.sweeps.suboptimality.report import figures, tables
from experiments.sweeps.suboptimality.report.findings import findings, headline
from experiments.sweeps.suboptimality.report.sections import Section, sections
from experiments.sweeps.suboptimality.report.texts import GLOSSARY, LEAD, METHOD

__all__ = ["document"]


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found = sections(records)
    return Document(
        title="Inference suboptimality in variational autoencoders",
        lead=LEAD,
        findings=headline(found) or [Finding("warning", "Nothing to show", "Every cell of the store diverged.")],
        overview=tables.overview(found),
        sections=[part(section) for section in found],
        method=METHOD,
        provenance=made_by(records),
        glossary=GLOSSARY,
        data={"gaps.csv": tables.csv_lines(found)},
    )


def part(section: Section) -> Part:
    """One section of the document."""
    s = section.settings
    lead = (
        f"{s['num_train']:,} training images, minibatches of {s['batch_size']}, KL divergence weighed up over {s['warm_up']:,} "
        f"steps; {s['latent_dim']} latents, decoder of two layers of {s['hidden_dim']}. Gaps of the first {s['rows']:,} "
        f"training and test rows by {s['num_samples']:,} draws; evidence of the first {s['ais_rows']:,} annealed too "
        f"({s['ais_chains']} chains, {s['ais_temperatures']} temperatures, {s['ais_leapfrog']} leapfrog steps)."
    )
    shown = [
        Figure(
            "gaps",
            "Gaps by encoder and family",
            "Whole bar: the inference gap. Thin bars: one standard error over rows and seeds, left of the amortization gap, "
            "right of the whole. The evidence is a bound from below, so the upper part may be larger, the lower may not.",
            partial(figures.gaps, section),
        ),
        Figure(
            "refinement",
            "Refinement from the encoder's output",
            "Share of the amortization gap that a number of steps closes, each number a run of its own, ± one "
            "standard error. The dashed line is the best factor that the search found.",
            partial(figures.refinement, section),
        ),
    ]
    drawn = shown if section.measured else []
    held = [tables.results(section), tables.refinement(section)] if section.measured else []
    return Part(section.name, section.title, lead, findings(section), drawn, held)
