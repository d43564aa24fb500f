"""The figures of the images sweep: curves, a line a seed, and reconstructions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting.figures import CONSTANT, CONTINUED, FACTORIZED, INK, Curve, Panel, drawn, ramp
from experiments.reporting.statistics import mean_over_seeds
from experiments.sweeps.images.report.claims import levels
from experiments.sweeps.images.report.sections import Comparison, Section

Colours = Mapping[str, str]
LABELS = {"step": "steps", "seconds": "training seconds", "elbo": "ELBO, watched rows (nats a row)"}
#: x and y of the panels of a row.
BOUNDS = (("step", "elbo"), ("seconds", "elbo"))
ERRORS = (("seconds", "train_mse"), ("seconds", "test_mse"))


def palette(sections: Iterable[Section]) -> dict[str, str]:
    """The colour of each guide from constant to F-VI, the same in every figure of a report."""
    arms = {arm.label: arm for section in sections for arm in section.arms}
    amortized = sorted({arm.width for arm in arms.values() if arm.guide == "amortized"})
    widths = dict(zip(amortized, ramp(len(amortized)), strict=True))
    others = {"constant": CONSTANT, "factorized": FACTORIZED, "continued": CONTINUED}
    return {label: others.get(arm.guide) or widths[arm.width] for label, arm in arms.items()}


def panels(comparisons: Sequence[Comparison], colours: Colours, shown: Sequence[tuple[str, str]]) -> list[list[Panel]]:
    """A row a protocol, a panel for each of the pairs that are `shown`."""
    return [[_panel(comparison, colours, x, y) for x, y in shown] for comparison in comparisons]


def _panel(comparison: Comparison, colours: Colours, x: str, y: str) -> Panel:
    lines, best, runs = [], comparison.best(), [run for arm in comparison.arms.values() for run in arm.runs.values()]
    for run in runs:
        known = np.isfinite(run.curve[y])
        lines.append(Curve(run.label, colours[run.label], run.curve[x][known], run.curve[y][known], broke=run.diverged))
    if y == "elbo":
        level = np.mean(list(levels(comparison, best).values())) if best else np.nan
        return Panel(LABELS[x], LABELS[y], lines, comparison.protocol, level, "A-VI's level")
    rows = y.removesuffix("_mse")
    level = mean_over_seeds(run.mean("mean_image_mse", rows) for run in runs).value
    return Panel(LABELS[x], "MSE a pixel", lines, f"{comparison.protocol}, {rows} rows", level, "mean image")


@drawn
def reconstructions(comparison: Comparison, colours: Colours) -> Figure:
    """Test images above each guide's reconstruction at the posterior means."""
    found = pictured(comparison)
    first = next(iter(found.values()))
    lines = [("original", INK, first["originals"])]
    lines += [(label, colours[label], images["reconstructions"]) for label, images in found.items()]
    count = len(first["originals"])
    figure = Figure(figsize=(0.82 * count + 1.25, 0.82 * len(lines)), layout="constrained")
    for row, (label, colour, images) in zip(figure.subplots(len(lines), count, squeeze=False), lines, strict=True):
        row[0].set_ylabel(label, color=colour, rotation="horizontal", ha="right", va="center")
        for axes, image in zip(row, images, strict=True):
            axes.set(xticks=[], yticks=[], frame_on=False)
            pixels = np.reshape(np.array(image, float), first["shape"]).transpose(1, 2, 0).clip(0, 1)
            axes.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1)
    return figure


def pictured(comparison: Comparison) -> dict[str, Mapping]:
    """By guide the images in the record of the first seed that did not diverge, where there are any."""
    firsts = {arm.label: next(iter(arm.done.values())).result("images") for arm in comparison.arms.values() if arm.done}
    return {label: images for label, images in firsts.items() if images and images["originals"]}
