"""The report of the images sweep: how much amortization costs on real images, under two protocols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from experiments.reporting.document import Document, Figure, Finding, made_by
from experiments.reporting.document import Section as Part
from experiments.reporting.figures import palette
from experiments.sweeps.images.report import curves, reconstructions, tables
from experiments.sweeps.images.report.answer import answer
from experiments.sweeps.images.report.findings import findings
from experiments.sweeps.images.report.records import most_at_once, read
from experiments.sweeps.images.report.sections import Section, sections
from experiments.sweeps.images.report.texts import GLOSSARY, LEAD, METHOD, counted

__all__ = ["document"]


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    cells = read(records)
    found = sections(cells)
    colours = palette([label for section in found for label in section.labels])
    nothing = "The store holds tuning cells alone; the results follow when the sweep goes on."
    at_once = f"Up to {counted(most_at_once(cells), 'cell')} of a machine ran at once: seconds do not repeat, steps do."
    return Document(
        title="What amortization costs on images",
        lead=LEAD,
        findings=[opening(section, colours) for section in found] or [Finding("warning", "No result yet", nothing)],
        overview=tables.claims(found),
        sections=[part(section, colours) for section in found],
        method=[*METHOD, at_once],
        provenance=made_by(records),
        glossary=GLOSSARY,
        data={"summary.csv": tables.summary_lines(found), "cells.csv": tables.cell_lines(cells)},
    )


def opening(section: Section, colours: Mapping[str, str]) -> Finding:
    """The answer of a section with its figure."""
    caption = "The first 500 training rows. A dot: training ended. 'F-VI from' goes on where that encoder ended."
    draw = partial(curves.opening, section, colours)
    return replace(answer(section), figure=Figure(section.name, "Training ELBO by second", caption, draw))


def part(section: Section, colours: Mapping[str, str]) -> Part:
    """One section of the document."""
    fixed = section.settings
    lead = (
        f"{fixed['num_train']:,} training rows, minibatches of {fixed['batch_size']:,}, {fixed['latent_dim']} latents a row, "
        f"hidden layers of {fixed['hidden_dim']}."
    )
    shown = [
        Figure(name, title, caption, partial(draw, section, colours))
        for name, title, caption, draw in drawings(section)
    ]
    return Part(section.name, section.title, lead, findings(section), shown, [tables.key(section)])


def drawings(section: Section) -> Iterator[tuple]:
    """Name, title, caption and function of each figure; one that would be empty is left out."""
    caption = "A line a seed; the first steps lie below. A cross: a run that diverged."
    yield "elbo", "ELBO by step and by second", caption, curves.bounds
    yield "mse", "Reconstruction error by second", "At the posterior means, a line a seed.", curves.errors
    if any(reconstructions.recorded(arm) for arm in section.arms):
        caption = "Test images and their reconstructions at the posterior means, the first seed of each guide."
        yield "reconstructions", "Reconstructions", caption, reconstructions.reconstructions
