"""The reconstructions of the images sweep: originals over what each guide makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.reporting.figures import INK, drawn
from experiments.sweeps.images.report.sections import Arm, Section


@drawn
def reconstructions(section: Section, colours: Mapping[str, str]) -> Figure:
    """Five test images above each guide's reconstruction at the posterior means, the protocols beside each other."""
    shown = [(protocol, [arm for arm in section.under(protocol) if recorded(arm)]) for protocol in section.protocols]
    shown = [(protocol, arms) for protocol, arms in shown if arms]
    rows = 1 + max(len(arms) for _, arms in shown)
    count = max(len(recorded(arm)["originals"]) for _, arms in shown for arm in arms)
    figure = Figure(figsize=((0.82 * count + 1.25) * len(shown), 0.82 * rows + 0.35), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.015, wspace=0.0, hspace=0.0)
    for block, (protocol, arms) in zip(
        np.atleast_1d(figure.subfigures(1, len(shown), wspace=0.05)), shown, strict=True
    ):
        grid = block.subplots(rows, count, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        first = recorded(arms[0])
        lines = [("original", INK, first["originals"])]
        lines += [(arm.label, colours[arm.label], recorded(arm)["reconstructions"]) for arm in arms]
        for line, (label, colour, images) in zip(grid, lines, strict=False):
            for axes, image in zip(line, images, strict=False):
                paint(axes, image, first["shape"])
            line[0].text(
                -0.12, 0.5, label, color=colour, transform=line[0].transAxes, ha="right", va="center", fontsize=8.5
            )
        block.suptitle(protocol, fontsize=10, fontweight="bold", x=0.02, ha="left")
    return figure


def recorded(arm: Arm) -> Mapping | None:
    """The recorded images of the arm's first seed that did not diverge."""
    images = arm.first.result("images")
    return images if images and images["originals"] and not arm.first.diverged else None


def paint(axes: Axes, image: Sequence, shape: Sequence[int]) -> None:
    """One image of `shape` [C, H, W] with values in [0, 1]."""
    pixels = np.clip(np.array(image, dtype=float).reshape(shape).transpose(1, 2, 0), 0, 1)
    axes.imshow(pixels[..., 0] if shape[0] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
