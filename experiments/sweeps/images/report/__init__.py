"""The report of the images sweep: how much amortization costs on real images, under two protocols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from experiments.reporting.document import Document, Figure, Note, reading
from experiments.reporting.statistics import SEEN
from experiments.sweeps.images.report import claims, figures, tables
from experiments.sweeps.images.report.answer import answer
from experiments.sweeps.images.report.sections import Section, read
from experiments.sweeps.images.report.warnings import warnings

__all__ = ["document"]

READING = f"""
Guides: one set of variational parameters for all rows (constant), computed by an encoder of width k (A-VI), kept for every
row (F-VI). ELBO: the exact bound in nats a row; on training rows it contains the KL divergence of the decoder's weights, on
test rows the local terms alone. MSE: of the reconstruction at the posterior means.

Published: one learning rate for all, a fixed number of steps. Fair: rates tuned for each guide, rounds of training until
the last half of the steps gains less than a stated share; F-VI's bound is, by seed, the best of its own start, of one from
the widest encoder's outputs, and of A-VI's. Test rows of F-VI are refined with the decoder frozen, which no encoder is
granted.

Errors are over seeds, the Monte Carlo error alone with one seed; gaps are taken seed by seed and count from {SEEN:g} of
them on. Curves, levels, times, and bounds at equal steps and seconds watch the first 500 training rows. A-VI's level: its
last point less {claims.LEVEL_SHARE:.0%} of its lead over the constant guide; '>' where too few seeds got there.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found = read(records)
    colours = figures.palette(found)
    nothing = "The store holds tuning cells alone; the results follow when the sweep goes on."
    return Document(
        title="What amortization costs on images",
        lead="One Bayesian decoder and three guides, which differ in where the variational parameters of a row come from.",
        notes=[_opening(section, colours) for section in found] or [Note("warning", nothing, "No result yet")],
        tables=[claims.table(found)] if found else [],
        parts=[
            *(_part(section, colours) for section in found),
            reading(READING),
        ],
    )


def _opening(section: Section, colours: figures.Colours) -> Note:
    """The answer of a section with its figure."""
    caption = "A line a seed; a dot: training ended. 'F-VI from' goes on where that encoder ended."
    draw = partial(figures.curves, section, colours, figures.OPENING, section.protocols[-1:])
    return replace(answer(section), figure=Figure("opening", "Training ELBO by second", caption, draw))


def _part(section: Section, colours: figures.Colours) -> Document:
    """One section of the report."""
    fixed, draw = section.settings, partial(figures.curves, section, colours, protocols=section.protocols)
    lead = (
        f"{fixed['num_train']:,} training rows, minibatches of {fixed['batch_size']:,}, {fixed['latent_dim']} latents a row, "
        f"hidden layers of {fixed['hidden_dim']}."
    )
    caption = "A line a seed; the first steps lie below. A cross: a run that diverged."
    shown = [
        Figure("elbo", "ELBO by step and by second", caption, partial(draw, shown=figures.BOUNDS)),
        Figure("mse", "Reconstruction error by second", "A line a seed.", partial(draw, shown=figures.ERRORS)),
    ]
    if any(figures.recorded(arm) for arm in section.arms):
        caption = "Test images and their reconstructions at the posterior means, the first seed of each guide."
        draw = partial(figures.reconstructions, section, colours)
        shown.append(Figure("reconstructions", "Reconstructions", caption, draw))
    return Document(section.title, lead, warnings(section), [tables.guides(section)], shown)
