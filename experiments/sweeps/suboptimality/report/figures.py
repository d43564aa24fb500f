"""The figures of the suboptimality report: stacked gaps, and the course of refinement."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from experiments.reporting.figures import FACTORIZED, INK, RAMP, drawn, label_ends, panels
from experiments.reporting.statistics import Mean
from experiments.sweeps.suboptimality.report.sections import PARTS, Section, share
from experiments.sweeps.suboptimality.report.tables import PUBLISHED, STEPS, measured, published_gaps

_COLOURS = {"amortization": FACTORIZED, "closed": RAMP[1], "rest": RAMP[3]}
_NAMES = {
    "amortization": "amortization gap",
    "closed": "approximation gap, closed by the richer family",
    "rest": "approximation gap, the rest",
}


@drawn
def gaps(section: Section) -> Figure:
    """Stacked gaps of every guide, training rows beside test rows, the published bar at the right."""
    arms, published = section.measured, published_gaps(section.settings["dataset"])
    places = len(arms) + (published is not None)
    figure, grid = panels(1, 1, width=max(5.2, 1.1 + 0.95 * places), height=3.6)
    axes = grid[0, 0]
    for place, arm in enumerate(arms):
        for shift, part in zip((-0.2, 0.2), PARTS, strict=True):
            bar(axes, place + shift, measured(arm, part), faint=part == "test")
    labels = [f"{arm.encoder}\n{arm.family}" for arm in arms]
    if published is not None:
        of = {name: Mean(value, math.nan, 0) for name, value in published.items()}
        inference = Mean(sum(published.values()), math.nan, 0)
        bar(axes, len(arms), of | {"closed": Mean(math.nan, math.nan, 0), "inference": inference}, faint=False)
        labels.append(f"{PUBLISHED}\nsmall, diag.")
        axes.axvline(len(arms) - 0.5, color=INK, lw=0.7, ls=(0, (2, 2)))
    axes.set_xticks(range(places), labels)
    axes.set_xlim(-0.6, places - 0.4)
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")
    axes.set_ylabel("nats a row")
    used = [name for name in _NAMES if name != "closed" or any(arm.richer for arm in arms)]
    handles = [Patch(color=_COLOURS[name], label=_NAMES[name]) for name in reversed(used)]
    handles.append(Patch(facecolor="#9aa0a8", hatch="////", edgecolor="white", label="the same on test rows"))
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def bar(axes: Axes, place: float, of: dict[str, Mean], *, faint: bool) -> None:
    """One stack: amortization below, approximation above; errors of the amortization gap and of the whole."""
    closed = of["closed"].value if of["closed"].known else 0.0
    heights = {"amortization": of["amortization"].value, "closed": closed, "rest": of["approximation"].value - closed}
    bottom = 0.0
    for name, height in heights.items():
        style = {"hatch": "////", "edgecolor": "white", "alpha": 0.75} if faint else {"edgecolor": "white"}
        axes.bar(place, height, 0.36, bottom=bottom, color=_COLOURS[name], linewidth=0.5, **style)
        bottom += height
    for name, shift in (("amortization", -0.05), ("inference", 0.05)):
        if math.isfinite(of[name].se):
            axes.errorbar(place + shift, of[name].value, of[name].se, color=INK, lw=1.1, capsize=2.2, capthick=1.1)


@drawn
def refinement(section: Section) -> Figure:
    """The share of the amortization gap closed by steps from the encoder's output, training rows left, test rows right."""
    figure, grid = panels(1, 2, width=4.3, sharey=True)
    ramp = np.linspace(0, len(RAMP) - 1, len(section.measured)).round().astype(int)
    lowest = 0.0
    for axes, part in zip(grid[0], PARTS, strict=True):
        ends = []
        for colour, arm in zip((RAMP[i] for i in ramp), section.measured, strict=True):
            shares = [share(arm.gain(part, steps), arm.amortization(part)) for steps in STEPS]
            values, errors = [of.value for of in shares], [of.se for of in shares]
            axes.errorbar(STEPS, values, errors, color=colour, marker="o", ms=3.6, capsize=2, lw=1.5)
            ends.append((values[-1], arm.label, colour))
            lowest = min([lowest, *(value for value in values if math.isfinite(value))])
        axes.set_xscale("log")
        axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
        axes.minorticks_off()
        axes.axhline(1.0, color=INK, lw=0.9, ls=(0, (4, 2)), zorder=1)
        axes.set_title(f"{part} rows")
        axes.set_xlabel("steps of refinement")
        # What few steps lose of a gap near zero is cut.
        axes.set_ylim(bottom=max(1.1 * lowest, -0.3))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        label_ends(axes, ends)
    grid[0, 0].set_ylabel("amortization gap closed")
    return figure
