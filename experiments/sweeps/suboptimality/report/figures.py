"""The figures of the suboptimality report: stacked gaps, and the course of refinement."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from experiments.reporting.figures import FACTORIZED, INK, RAMP, drawn, legend, panels, ramp
from experiments.reporting.statistics import Mean
from experiments.sweeps.suboptimality.report.arms import PARTS, Section
from experiments.sweeps.suboptimality.report.tables import STEPS, lines, published

_COLOURS = {
    "amortization gap": FACTORIZED,
    "approximation gap, closed by the richer family": RAMP[1],
    "approximation gap, the rest": RAMP[3],
}


@drawn
def gaps(section: Section) -> Figure:
    """Stacked gaps of every guide, training rows beside test rows, the published bar at the right."""
    measured, quoted = lines(section), published(section.settings["dataset"])
    labels = [f"{arm.encoder}\n{arm.family}" for arm in section.measured] + ["Cremer et al.\nsmall, diag."] * len(
        quoted
    )
    figure, ((axes,),) = panels(1, 1, width=max(5.2, 1.1 + 0.95 * len(labels)), height=3.2)
    for number, line in enumerate(measured):
        _bar(axes, number // 2 + 0.4 * (number % 2) - 0.2, line.means, faint=line.part == "test")
    for line in quoted:
        _bar(axes, len(labels) - 1, line.means, faint=False)
        axes.axvline(len(labels) - 1.5, color=INK, lw=0.7, ls=(0, (2, 2)))
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")
    axes.set_ylabel("nats a row")
    handles = [Patch(color=colour, label=name) for name, colour in _COLOURS.items()]
    legend(
        figure,
        [*handles, Patch(facecolor="#9aa0a8", hatch="////", edgecolor="white", label="the same on test rows")],
        2,
    )
    return figure


def _bar(axes: Axes, place: float, means: Mapping[str, Mean], *, faint: bool) -> None:
    """One stack: amortization below, approximation above; errors of the amortization gap and of the whole."""
    closed = means["closed"].value if "closed" in means and means["closed"].known else 0.0
    heights = (means["amortization"].value, closed, means["approximation"].value - closed)
    style = {"hatch": "////", "alpha": 0.75} if faint else {}
    for height, bottom, colour in zip(heights, np.cumsum([0.0, *heights]), _COLOURS.values(), strict=False):
        axes.bar(place, height, 0.36, bottom=bottom, color=colour, linewidth=0.5, edgecolor="white", **style)
    for name, shift in (("amortization", -0.05), ("inference", 0.05)):
        if math.isfinite(means[name].se):
            axes.errorbar(
                place + shift, means[name].value, means[name].se, color=INK, lw=1.1, capsize=2.2, capthick=1.1
            )


@drawn
def refinement(section: Section) -> Figure:
    """The share of the amortization gap closed by steps from the encoder's output, training rows left, test rows right."""
    figure, (row,) = panels(1, 2, sharey=True)
    lowest = 0.0
    for axes, part in zip(row, PARTS, strict=True):
        for arm, colour in zip(section.measured, ramp(len(section.measured)), strict=True):
            shares = [arm.closed(part, steps) for steps in STEPS]
            values, errors = ([getattr(each, name) for each in shares] for name in ("value", "se"))
            axes.errorbar(STEPS, values, errors, color=colour, marker="o", ms=3.6, capsize=2, lw=1.5, label=arm.label)
            lowest = min([lowest, *filter(math.isfinite, values)])
        axes.set_xscale("log")
        axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axes.minorticks_off()
        axes.axhline(1.0, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=1)
        axes.set_title(f"{part} rows")
        axes.set_xlabel("steps of refinement")
    # What few steps lose of a gap near zero is cut.
    row[0].set_ylim(bottom=max(1.1 * lowest, -0.3))
    row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    row[0].set_ylabel("amortization gap closed")
    legend(figure, row[0].get_legend_handles_labels()[0], 3)
    return figure
