"""Curves of the images sweep, a line a seed: bounds and errors by step and by second; each returns a PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.figures import INK, drawn, fit_scale, label_ends, panels
from experiments.sweeps.images.report.answer import answered
from experiments.sweeps.images.report.comparisons import Comparison, best_amortized
from experiments.sweeps.images.report.sections import Arm, Section

Colours = Mapping[str, str]
AXES = {"step": "steps", "seconds": "training seconds"}


@drawn
def opening(section: Section, colours: Colours) -> Figure:
    """The bound against seconds under the protocol that answers, with A-VI's level and the second it ended."""
    arms = section.under(answered(section))
    figure, ((axes,),) = panels(1, 1, width=4.6, height=3.8)  # readable on a phone
    low, high = view(arms, "elbo")
    lines(axes, arms, colours, "seconds", "elbo")
    dotted = {"arrowstyle": "-", "lw": 0.8, "ls": (0, (1, 2)), "shrinkA": 0, "shrinkB": 0}
    for arm in arms:
        for cell in arm.done.values():
            ended, arrow = (cell.curve["seconds"][-1], cell.curve["elbo"][-1]), dotted | {"color": colours[arm.label]}
            axes.annotate("", (1, ended[1]), ended, ("axes fraction", "data"), "data", arrowprops=arrow)
    begin_in_view(axes, [(arm, "seconds", "elbo") for arm in arms], low, high)
    best = best_amortized(section, arms[0].protocol)
    if best is not None and (level := Comparison(section, best).level).known:
        reference(axes, level.value, f"{best.label}'s level")
    axes.set_xlabel("training seconds, a line a seed")
    axes.set_ylabel("ELBO, watched rows (nats a row)")
    label_ends(axes, [(final(arm, "elbo"), arm.label, colours[arm.label]) for arm in arms])
    return figure


@drawn
def bounds(section: Section, colours: Colours) -> Figure:
    """The bound by step (above) and by second (below), a column a protocol, on the same axes."""
    figure, grid = panels(2, len(section.protocols), sharey=True, sharex="row")
    low, high = view(section.arms, "elbo")
    for row, x in zip(grid, AXES, strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            lines(axes, section.under(protocol), colours, x, "elbo")
            axes.set_title(protocol if x == "step" else "")
            axes.set_xlabel(AXES[x])
        begin_in_view(row[0], [(arm, x, "elbo") for arm in section.arms], low, high)
        row[0].set_ylabel("ELBO, watched rows (nats a row)")
    name_ends(grid, ["elbo", "elbo"], section, colours)
    return figure


@drawn
def errors(section: Section, colours: Colours) -> Figure:
    """The MSE on training (above) and test rows (below) by second, a column a protocol, on the same axes."""
    names = ("train_mse", "test_mse")
    figure, grid = panels(2, len(section.protocols), sharey=True, sharex=True)
    for row, name in zip(grid, names, strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            lines(axes, section.under(protocol), colours, "seconds", name)
            axes.set_title(f"{protocol}, {name.removesuffix('_mse')} rows")
            reference(axes, section.mean_image(name.removesuffix("_mse")), "mean image", side="right")
        row[0].set_ylabel("MSE a pixel")
    for axes in grid[-1]:
        axes.set_xlabel(AXES["seconds"])
    ends = [view(section.arms, name) for name in names]
    top = max([section.mean_image("train"), *(high for _, high in ends)])
    bottom = min(low for low, _ in ends)
    begin_in_view(grid[0, 0], [(arm, "seconds", "train_mse") for arm in section.arms], bottom, 1.25 * top)
    name_ends(grid, names, section, colours)
    return figure


def lines(axes: Axes, arms: Sequence[Arm], colours: Colours, x: str, name: str) -> None:
    """A line a seed with a dot where training ended; one that diverged is dashed, up to a cross where it broke off."""
    shown = False
    for arm in arms:
        for cell in arm.cells.values():
            at = np.isfinite(cell.curve[name])
            if not at.any():
                continue
            shown, places, values = True, cell.curve[x][at], cell.curve[name][at]
            colour, ended = colours[arm.label], "x" if cell.diverged else "o"
            axes.plot(places, values, color=colour, lw=1.2, ls=(0, (3, 2)) if cell.diverged else "-")
            axes.plot(places[-1], values[-1], ended, color=colour, ms=7 if cell.diverged else 4, mew=1.8, zorder=3)
    if not shown:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="#80868f")


def view(arms: Iterable[Arm], name: str) -> tuple[float, float]:
    """Limits that show where training ends; the first steps lie far outside. nan where nothing ended."""
    ends = [
        value for arm in arms for cell in arm.done.values() for value in cell.curve[name][-1:] if np.isfinite(value)
    ]
    if not ends:
        return np.nan, np.nan
    span = max(ends) - min(ends) or abs(max(ends)) or 1.0
    return min(ends) - 0.25 * span, max(ends) + 0.08 * span


def begin_in_view(axes: Axes, curves: Iterable[tuple[Arm, str, str]], low: float, high: float) -> None:
    """Set both limits: y to these, x from where the first of the curves enters them; the axes may be shared."""
    if not np.isfinite([low, high]).all():
        return
    axes.set_ylim(low, high)
    inside, last = [], []
    for arm, x, name in curves:
        for cell in arm.cells.values():
            places, values = cell.curve[x], cell.curve[name]
            last += [float(place) for place in places[-1:]]
            seen = np.flatnonzero((values >= low) & (values <= high) & (places > 0))
            inside += [float(places[seen[0]])] if len(seen) else []
    if inside:
        left, right = 0.8 * min(inside), 1.05 * max(last)
        fit_scale(axes.xaxis, [left, right])
        axes.set_xlim(
            left if axes.get_xscale() == "log" else 0.0, 1.15 * right if axes.get_xscale() == "log" else right
        )


def final(arm: Arm, name: str) -> float:
    """The mean over seeds of the last value of a curve."""
    ends = [cell.curve[name][-1] for cell in arm.done.values() if len(cell.curve[name])]
    return float(np.mean(ends)) if ends else np.nan


def name_ends(grid: np.ndarray, names: Sequence[str], section: Section, colours: Colours) -> None:
    """Name the lines of every panel at its right edge; a row of panels shows one curve each."""
    for row, name in zip(grid, names, strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            arms = section.under(protocol)
            label_ends(axes, [(final(arm, name), arm.label, colours[arm.label]) for arm in arms])


def reference(axes: Axes, level: float, text: str, *, side: str = "left") -> None:
    """A horizontal line that is no guide's, named at the end where no curve is."""
    if np.isfinite(level):
        axes.axhline(level, color=INK, lw=0.9, ls=(0, (2, 2)), zorder=1)
        axes.annotate(
            text, (0.01 if side == "left" else 0.99, level), xycoords=("axes fraction", "data"), xytext=(0, 2),
            textcoords="offset points", fontsize=7.5, color=INK, ha=side, va="bottom", annotation_clip=True,
        )  # fmt: skip
