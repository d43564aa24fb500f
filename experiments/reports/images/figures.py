"""The figures of the images sweep; every function returns the bytes of a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures import FAINT, INK, drawn, fit_scale, label_ends, panels
from experiments.reports.images.cells import Arm, Section
from experiments.summary import Mean, median_duration, with_error

Colours = Mapping[str, str]
AXES = {"step": "steps", "seconds": "training seconds"}


@drawn
def loss(section: Section, colours: Colours) -> Figure:
    """-ELBO by step (above) and by second (below), a column a protocol."""
    figure, grid = panels(2, len(section.protocols), sharey=True)
    for row, x in zip(grid, AXES, strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            curves(axes, section.under(protocol), colours, x, "elbo", sign=-1)
            axes.set_title(protocol if x == "step" else "")
            axes.set_xlabel(AXES[x])
        row[0].set_ylabel("-ELBO (nats a row)")
    low, high = loss_limits(section)
    if np.isfinite([low, high]).all() and low < high:
        grid[0, 0].set_ylim(low, high)
    for row in grid:
        for axes, protocol in zip(row, section.protocols, strict=True):
            start_in_view(axes, high)
            reference(
                axes, -section.elbo_level if section.elbo_level is not None else np.nan, "ELBO level", (0, (2, 2))
            )
            name_ends(axes, section.under(protocol), colours, "elbo", sign=-1)
    return figure


def start_in_view(axes: Axes, top: float) -> None:
    """Let x begin just before the first curve comes below `top`; logarithmic axes only, linear where little is left."""
    if axes.get_xscale() != "log":
        return
    shown = [(x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True) if x > 0]
    below = [x for x, y in shown if y < top]
    if below:
        left, right = max((x for x, _ in shown if x < min(below)), default=min(below)), max(x for x, _ in shown)
        if right <= 30 * left:
            axes.set_xscale("linear")
            axes.set_xlim(right=right)
            fit_scale(axes.xaxis, [left, right])
        axes.set_xlim(left=left)


def loss_limits(section: Section) -> tuple[float, float]:
    """Limits that show where training ends; the first steps, orders of magnitude above, leave through the top."""
    finals = [-final(arm, "elbo") for arm in section.arms]
    finals = [value for value in finals if np.isfinite(value)]
    if not finals:
        return np.nan, np.nan
    span = max(finals) - min(finals) or abs(max(finals)) or 1.0
    return min(finals) - 0.08 * span, max(finals) + 0.6 * span


@drawn
def mse(section: Section, colours: Colours, x: str) -> Figure:
    """MSE at the posterior means on training (above) and test rows (below) by `x`, a column a protocol."""
    figure, grid = panels(2, len(section.protocols), sharey=True, sharex=x == "step")
    for row, rows in zip(grid, ("train", "test"), strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            curves(axes, section.under(protocol), colours, x, f"{rows}_mse")
            axes.set_title(f"{protocol}, {rows} rows")
            if x == "seconds" or rows == "test":
                axes.set_xlabel(AXES[x])
        row[0].set_ylabel("MSE a pixel")
    values = [
        v
        for arm in section.arms
        for cell in arm.cells.values()
        for v in [*cell.curve["train_mse"], *cell.curve["test_mse"]]
    ]
    settled = [final(arm, f"{rows}_mse") for arm in section.arms for rows in ("train", "test")]
    known = [value for value in settled + [section.mean_image("train")] if np.isfinite(value)]
    if known:
        grid[0, 0].set_ylim(0.85 * min(known), 1.6 * max(known))
        fit_scale(grid[0, 0].yaxis, [value for value in values if value <= 1.6 * max(known)])
    for row, rows in zip(grid, ("train", "test"), strict=True):
        for axes, protocol in zip(row, section.protocols, strict=True):
            reference(axes, section.mean_image(rows), "mean image", (0, (1, 1.2)))
            for level in section.criteria:
                if rows == "train" and level[1] == "train_mse":
                    reference(axes, level[2], f"tolerance {level[2]:g}", (0, (4, 2)))
            name_ends(axes, section.under(protocol), colours, f"{rows}_mse")
    return figure


def curves(axes: Axes, arms: Sequence[Arm], colours: Colours, x: str, name: str, sign: int = 1) -> None:
    """Mean over seeds with the band of their range; a run that diverged dashed, up to a cross where it broke off."""
    shown: list[float] = []
    for arm in arms:
        colour = colours[arm.label]
        grid = common_steps(arm)
        lines = [(cell.curve, np.isin(cell.curve["step"], grid)) for cell in arm.done.values()]
        if lines and len(grid):
            places = np.mean([curve[x][at] for curve, at in lines], axis=0)
            values = sign * np.stack([curve[name][at] for curve, at in lines])
            if np.isfinite(values).any():
                axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, lw=0)
                axes.plot(places, values.mean(axis=0), color=colour, zorder=3 if arm.guide == "factorized" else 2)
                shown += [float(place) for place in places]
        for cell in arm.cells.values():
            broken = sign * cell.curve[name]
            at = np.isfinite(broken)
            if cell.diverged and at.any():
                axes.plot(cell.curve[x][at], broken[at], color=colour, lw=1.0, ls=(0, (3, 2)))
                axes.plot(cell.curve[x][at][-1], broken[at][-1], color=colour, marker="x", ms=7, mew=1.8)
    fit_scale(axes.xaxis, shown)
    if not shown:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", va="center", color="#80868f")


def common_steps(arm: Arm) -> np.ndarray:
    """The steps at which every seed was evaluated."""
    grids = [set(cell.curve["step"].tolist()) for cell in arm.done.values()]
    return np.array(sorted(set.intersection(*grids))) if grids else np.array([])


def final(arm: Arm, name: str) -> float:
    """The mean over seeds of the last value of a curve."""
    ends = [cell.curve[name][-1] for cell in arm.done.values() if len(cell.curve[name])]
    return float(np.mean(ends)) if ends else np.nan


def name_ends(axes: Axes, arms: Sequence[Arm], colours: Colours, name: str, sign: int = 1) -> None:
    label_ends(axes, [(sign * final(arm, name), arm.label, colours[arm.label]) for arm in arms])


def reference(axes: Axes, level: float, text: str, dashes: tuple) -> None:
    """A horizontal line that is no guide's, named on its left end."""
    if np.isfinite(level):
        axes.axhline(level, color=INK, lw=0.9, ls=dashes, zorder=1)
        axes.annotate(
            text, (0.01, level), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            fontsize=7.5, color=INK, va="bottom", annotation_clip=True,
        )  # fmt: skip


@drawn
def tolerance(section: Section, colours: Colours, name: str, level: float) -> Figure:
    """Time until the curve of `name` meets `level`: steps left, seconds right, a row a protocol, a dot a seed."""
    labels = section.labels
    figure, grid = panels(len(section.protocols), 2, height=0.75 + 0.3 * len(labels), sharex="col", sharey=True)
    for row, protocol in zip(grid, section.protocols, strict=True):
        for axes, unit in zip(row, AXES, strict=True):
            for place, label in enumerate(labels):
                arm = section.arm(protocol, label)
                if arm is not None:
                    strip(axes, place, arm, name, level, unit, colours[label])
            axes.set_title(f"{protocol}, {AXES[unit]}")
            axes.set_yticks(range(len(labels)), labels)
            axes.grid(False, axis="y")
        row[0].set_ylim(len(labels) - 0.4, -0.6)
    for axes, unit in zip(grid[-1], AXES, strict=True):
        axes.set_xlabel(f"{AXES[unit]} until there     ▷ not there by then     × diverged")
        times = [getattr(passage, unit) for arm in section.arms for passage in arm.passages(name, level)]
        fit_scale(axes.xaxis, times)
        if axes.get_xscale() == "linear" and times:
            axes.set_xlim(0, 1.06 * max(times) or 1.0)
    return figure


def strip(axes: Axes, place: int, arm: Arm, name: str, level: float, unit: str, colour: str) -> None:
    """A dot a seed, other marks where it never got there, a bar at the median; a box where four or more seeds did."""
    passages = arm.passages(name, level)
    reached = [getattr(passage, unit) for passage in passages if passage.reached]
    if len(reached) == len(passages) >= 4:
        axes.boxplot(
            [reached], positions=[place], orientation="horizontal", widths=0.56, showfliers=False, patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.25, "edgecolor": "none"}, medianprops={"color": "none"},
            whiskerprops={"color": colour}, capprops={"color": "none"}, manage_ticks=False,
        )  # fmt: skip
    median = median_duration(passages, unit)
    if median is not None and not median.censored:
        axes.plot([median.value] * 2, [place - 0.38, place + 0.38], color=colour, lw=2.2, solid_capstyle="butt")
    spread = np.linspace(-0.26, 0.26, len(arm.cells)) if len(arm.cells) > 1 else [0.0]
    for cell, shift in zip(arm.cells.values(), spread, strict=True):
        passage = cell.passage(name, level)
        if passage is not None:
            marker = "o" if passage.reached else "x" if cell.diverged else ">"
            face = colour if passage.reached else "white"
            axes.plot(getattr(passage, unit), place + shift, marker, ms=4.4, mfc=face, mec=colour, mew=1.3, zorder=3)


@drawn
def by_width(section: Section, colours: Colours) -> Figure:
    """Final ELBO (above) with the constant guide and F-VI as bands, and the joint gap (below), by encoder width."""
    figure, grid = panels(2, len(section.protocols), sharey="row")
    for column, protocol in zip(grid.T, section.protocols, strict=True):
        arms = section.amortized(protocol)
        places = range(len(arms))
        for arm in section.under(protocol):
            if arm not in arms:
                band(column[0], arm.mean("final", "train", "elbo"), colours[arm.label])
        gaps = [section.joint_gap(arm, "final", "train", "elbo") for arm in arms]
        for place, arm, gap in zip(places, arms, gaps, strict=True):
            point(column[0], place, arm.mean("final", "train", "elbo"), colours[arm.label])
            point(column[1], place, gap, colours[arm.label])
            if gap.known:
                column[1].annotate(
                    with_error(gap), (place, gap.value), xytext=(0, 8), textcoords="offset points",
                    fontsize=8, ha="center",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
                )  # fmt: skip
        for axes in column:
            axes.set_xticks(list(places), [f"{arm.width:,}" for arm in arms])
            axes.set_xlim(-0.5, max(len(arms) - 0.5, 0.5))
            axes.grid(False, axis="x")
        column[1].axhline(0, color=colours.get("F-VI", INK), lw=1.2)
        column[0].set_title(protocol)
        column[1].set_xlabel("encoder width k")
    grid[0, 0].set_ylabel("final ELBO (nats a row)")
    grid[1, 0].set_ylabel("joint gap, F-VI - A-VI (nats a row)")
    grid[1, 0].margins(y=0.2)
    for axes, protocol in zip(grid[0], section.protocols, strict=True):
        bands = [arm for arm in section.under(protocol) if arm.guide != "amortized"]
        label_ends(axes, [(arm.mean("final", "train", "elbo").value, arm.label, colours[arm.label]) for arm in bands])
    return figure


def point(axes: Axes, place: float, mean: Mean, colour: str, **kwargs: object) -> None:
    """A mean with bars of one standard error."""
    if mean.known:
        error = mean.se if np.isfinite(mean.se) else 0.0
        axes.errorbar(place, mean.value, yerr=error, color=colour, marker="o", ms=6, capsize=3, lw=1.4, **kwargs)


def band(axes: Axes, mean: Mean, colour: str) -> None:
    """A mean as a line across, with a band of one standard error."""
    if mean.known:
        error = mean.se if np.isfinite(mean.se) else 0.0
        axes.axhspan(mean.value - error, mean.value + error, color=colour, alpha=0.2, lw=0)
        axes.axhline(mean.value, color=colour, lw=1.4, zorder=1)


@drawn
def refinement(section: Section, colours: Colours) -> Figure:
    """The amortization gap of each guide that was refined: training rows filled, test rows hollow."""
    labels = [
        label for label in section.labels if any(refined(section, protocol, label) for protocol in section.protocols)
    ]
    figure, grid = panels(1, len(section.protocols), height=0.9 + 0.46 * len(labels), sharey=True, sharex=True)
    for axes, protocol in zip(grid[0], section.protocols, strict=True):
        for place, label in enumerate(labels):
            arm = refined(section, protocol, label)
            if arm is None:
                continue
            for rows, shift, face in (("train", -0.19, colours[label]), ("test", 0.19, "white")):
                gap = arm.mean("refined", rows, "gain")
                if gap.known:
                    error = gap.se if np.isfinite(gap.se) else 0.0
                    axes.errorbar(
                        gap.value, place + shift, xerr=error, color=colours[label],
                        marker="o", ms=6, mfc=face, capsize=3, lw=1.4,
                    )  # fmt: skip
                    axes.annotate(
                        f"{with_error(gap)} {rows}", (gap.value + error, place + shift),
                        xytext=(9, 0), textcoords="offset points",
                        fontsize=7.5, va="center", color="#5a626d",
                    )  # fmt: skip
        axes.axvline(0, color=FAINT, lw=1.2)
        axes.set_title(protocol)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(False, axis="y")
        axes.set_xlabel("amortization gap (nats a row)")
    low, high = grid[0, 0].get_xlim()
    grid[0, 0].set_xlim(low, low + 1.45 * (high - low))  # room for the numbers right of the last point
    return figure


def refined(section: Section, protocol: str, label: str) -> Arm | None:
    """The arm if any of its seeds was refined."""
    arm = section.arm(protocol, label)
    return arm if arm is not None and arm.mean("refined", "train", "gain").known else None
