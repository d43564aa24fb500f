"""The report of the images sweep: how much amortization costs on real images, under two protocols."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from experiments.document import Document, Figure, Finding
from experiments.document import Section as Part
from experiments.figures import palette
from experiments.reports.images import figures, pictures, tables
from experiments.reports.images.cells import Section, sections
from experiments.reports.images.findings import findings, headline
from experiments.reports.images.records import CellRecord
from experiments.reports.images.words import GLOSSARY, LEAD, METHOD

__all__ = ["document"]


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    cells = [CellRecord(record) for _, record in sorted(records.items())]
    found = sections(records)
    colours = palette(label for section in found for label in section.labels)
    return Document(
        title="What amortization costs on images",
        lead=LEAD,
        findings=headline(found) or [Finding("warning", "Nothing to compare", missing_pair(found))],
        overview=tables.overview(found),
        sections=[part(section, colours) for section in found],
        method=METHOD,
        provenance=tables.provenance(cells),
        glossary=GLOSSARY,
        data={"summary.csv": tables.summary_lines(found), "cells.csv": tables.cell_lines(cells)},
    )


def missing_pair(found: list[Section]) -> str:
    if not found:
        return "The store holds tuning cells alone; the results follow when the sweep goes on."
    return "No section holds finished cells of both F-VI and an amortized guide of width 64 or more under one protocol."


def part(section: Section, colours: Mapping[str, str]) -> Part:
    """One section of the document; a figure that would be empty is left out."""
    fixed = section.settings
    lead = (
        f"{fixed['num_train']:,} training rows (subset of seed {fixed['data_seed']}), minibatches of "
        f"{fixed['batch_size']:,}, {fixed['latent_dim']} local latents a row, hidden layers of {fixed['hidden_dim']}."
    )
    shown = [
        Figure(
            "loss", "Loss: negative ELBO by step and by second",
            "Exact bound in nats a row, training rows: mean over seeds, band from the lowest to the highest seed. "
            "The dotted line is the ELBO level of the times below; the axis is cut above the constant guide, so the "
            "first steps leave through the top. A dashed line that ends in a cross is a run that diverged.",
            partial(figures.loss, section, colours),
        ),
        *(
            Figure(
                f"mse-by-{x}", f"Reconstruction error by {x}",
                "Mean squared error a pixel at the posterior means, training rows above and test rows below, mean "
                "over seeds with the band of their range; the axis is cut above the mean image. Guides without a "
                "posterior for test rows while they train have no line there.",
                partial(figures.mse, section, colours, x),
            )
            for x in ("step", "seconds")
        ),
        *(
            Figure(
                f"time-to-{'elbo' if name == 'elbo' else f'mse-{level:g}'}", f"Time to {title}",
                "A dot a seed: the first evaluation that meets the level, so later than the truth by at most one "
                "interval of the evaluations. A hollow triangle is a seed that had not met it when its training "
                "ended, a cross one that diverged. Bar: median; a box where four or more seeds all met it.",
                partial(figures.tolerance, section, colours, name, level),
            )
            for title, name, level in section.criteria
        ),
    ]  # fmt: skip
    if any(section.amortized(protocol) for protocol in section.protocols):
        caption = (
            "Fresh draws, training rows, mean over seeds ± one standard error. Below zero, F-VI has not converged."
        )
        shown.append(
            Figure(
                "by-width",
                "Final ELBO and joint gap by encoder width",
                caption,
                partial(figures.by_width, section, colours),
            )
        )
    if any(pictures.recorded(arm) for arm in section.arms):
        caption = "Test images and their reconstructions at the posterior means, the first seed of each guide."
        shown.append(
            Figure("reconstructions", "Reconstructions", caption, partial(pictures.reconstructions, section, colours))
        )
    if any(figures.refined(section, arm.protocol, arm.label) for arm in section.arms):
        caption = (
            "What refining each row from the guide's own output gains with the globals frozen, ± one standard error: "
            "training rows filled, test rows hollow."
        )
        shown.append(
            Figure("amortization-gap", "Amortization gap", caption, partial(figures.refinement, section, colours))
        )
    return Part(section.name, section.title, lead, findings(section), shown, [tables.results(section)])
