"""The figures of the images sweep: curves, a line a seed, and reconstructions; each returns a PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.reporting.figures import (
    CONSTANT,
    CONTINUED,
    FACTORIZED,
    INK,
    drawn,
    fit_scale,
    legend,
    panels,
    ramp,
)
from experiments.sweeps.images.report.claims import levels
from experiments.sweeps.images.report.sections import Arm, Section, place

Colours = Mapping[str, str]
LABELS = {
    "step": "steps", "seconds": "training seconds", "elbo": "ELBO, watched rows (nats a row)",
    "train_mse": "MSE a pixel, training rows", "test_mse": "MSE a pixel, test rows",
}  # fmt: skip
#: What the panels of a figure show, from top to bottom: x and y.
OPENING = (("seconds", "elbo"),)
BOUNDS = (("step", "elbo"), ("seconds", "elbo"))
ERRORS = (("seconds", "train_mse"), ("seconds", "test_mse"))


def palette(sections: Iterable[Section]) -> dict[str, str]:
    """The colour of each guide from constant to F-VI, the same in every figure of a report."""
    found = sorted((arm for section in sections for arm in section.arms), key=place)
    arms = {arm.label: arm for arm in found}
    widths = sorted({arm.width for arm in arms.values() if arm.guide == "amortized"})
    amortized = dict(zip(widths, ramp(len(widths)), strict=True))
    others = {"constant": CONSTANT, "factorized": FACTORIZED, "continued": CONTINUED}
    return {label: others.get(arm.guide) or amortized[arm.width] for label, arm in arms.items()}


@drawn
def curves(section: Section, colours: Colours, shown: Sequence[tuple[str, str]], protocols: Sequence[str]) -> Figure:
    """A row for each of the pairs that are `shown`, a column a protocol, all on the same axes."""
    figure, grid = panels(len(shown), len(protocols), sharey=True, sharex="row")
    arms = [arm for protocol in protocols for arm in section.under(protocol)]
    for row, (x, y) in zip(grid, shown, strict=True):
        for axes, protocol in zip(row, protocols, strict=True):
            _lines(axes, section.under(protocol), colours, x, y)
            axes.set_title(protocol if len(protocols) > 1 and (x, y) == shown[0] else "")
            axes.set_xlabel(LABELS[x])
            if y == "elbo":
                best = section.best_amortized(protocol)
                level = np.mean(list(levels(section, best).values())) if best else np.nan
                _reference(axes, level, "A-VI's level")
            else:
                _reference(axes, section.mean_image(y.removesuffix("_mse")), "mean image")
        row[0].set_ylabel(LABELS[y])
        _fit(row[0], arms, x, y, [y for _, y in shown])
    labels = {arm.label for arm in arms}
    handles = [Line2D([], [], color=colour, label=label) for label, colour in colours.items() if label in labels]
    legend(figure, handles, 3 * len(protocols))
    return figure


def _lines(axes: Axes, arms: Sequence[Arm], colours: Colours, x: str, y: str) -> None:
    """A line a seed with a dot where training ended; one that diverged is dashed, up to a cross where it broke off."""
    for arm in arms:
        for run in arm.runs.values():
            known = np.isfinite(run.curve[y])
            places, values = run.curve[x][known], run.curve[y][known]
            colour, ended = colours[arm.label], "x" if run.diverged else "o"
            axes.plot(places, values, color=colour, lw=1.2, ls=(0, (3, 2)) if run.diverged else "-")
            axes.plot(places[-1:], values[-1:], ended, color=colour, ms=7 if run.diverged else 4, mew=1.8, zorder=3)


def _fit(axes: Axes, arms: Sequence[Arm], x: str, y: str, names: Sequence[str]) -> None:
    """Limits that show where training ends: y from the ends, x from where the first curve enters; axes are shared."""
    runs = [run for arm in arms for run in arm.runs.values() if len(run.curve[x])]
    ends = np.array([run.curve[name][-1] for run in runs if not run.diverged for name in names])
    ends = ends[np.isfinite(ends)]
    if not len(ends):
        return
    span = np.ptp(ends) or abs(ends.max()) or 1.0
    low, high = ends.min() - 0.25 * span, ends.max() + (0.08 if y == "elbo" else 0.25) * span
    axes.set_ylim(low, high)
    seen = [run.curve[x][(run.curve[y] >= low) & (run.curve[y] <= high) & (run.curve[x] > 0)] for run in runs]
    left = 0.8 * min((places[0] for places in seen if len(places)), default=1.0)
    right = 1.05 * max(run.curve[x][-1] for run in runs)
    fit_scale(axes.xaxis, [left, right])
    axes.set_xlim(left if axes.get_xscale() == "log" else 0.0, right)


def _reference(axes: Axes, level: float, text: str) -> None:
    """A horizontal line that is no guide's."""
    if np.isfinite(level):
        axes.axhline(level, color=INK, lw=0.9, ls=(0, (2, 2)), zorder=1)
        axes.annotate(
            text, (0.01, level), (0, 2), ("axes fraction", "data"), "offset points", fontsize=7.5, annotation_clip=True
        )


@drawn
def reconstructions(section: Section, colours: Colours) -> Figure:
    """Five test images above each guide's reconstruction at the posterior means, the protocols beside each other."""
    shown = [[arm for arm in section.under(protocol) if recorded(arm)] for protocol in section.protocols]
    shown = [arms for arms in shown if arms]
    rows, count = 1 + max(map(len, shown)), len(recorded(shown[0][0])["originals"])
    figure = Figure(figsize=((0.82 * count + 1.25) * len(shown), 0.82 * rows + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.015, wspace=0.0, hspace=0.0)
    for block, arms in zip(np.atleast_1d(figure.subfigures(1, len(shown), wspace=0.05)), shown, strict=True):
        lines = [("original", INK, recorded(arms[0])["originals"])]
        lines += [(arm.label, colours[arm.label], recorded(arm)["reconstructions"]) for arm in arms]
        grid = block.subplots(rows, count, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for row, (label, colour, images) in zip(grid, lines, strict=False):
            row[0].text(
                -0.12, 0.5, label, color=colour, transform=row[0].transAxes, ha="right", va="center", fontsize=8.5
            )
            for axes, image in zip(row, images, strict=False):
                pixels = np.reshape(np.array(image, float), recorded(arms[0])["shape"]).transpose(1, 2, 0).clip(0, 1)
                axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1)
        block.suptitle(arms[0].protocol, fontsize=10, fontweight="bold", x=0.02, ha="left")
    return figure


def recorded(arm: Arm) -> Mapping | None:
    """The recorded images of the arm's first seed that did not diverge."""
    images = arm.first.result("images")
    return images if images and images["originals"] and not arm.first.diverged else None
