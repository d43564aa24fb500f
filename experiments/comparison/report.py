"""The report of a comparison: gaps, how soon each guide gets near the best bound, and the bounds on the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import CONSTANT, FACTORIZED, INK, drawn, fit_scale, legend, panels, ramp
from experiments.reporting.records import pick
from experiments.reporting.statistics import Duration, Mean, mean_over_seeds, median_duration
from experiments.reporting.tables import Column, Table

__all__ = ["Line", "document"]

#: How near a loss comes to that of the best bound before it counts as there.
NEAR = 0.01
#: What it takes to get there: the name of it in a `Line`, and in words.
MEASURES = (("looks", "steps"), ("seconds", "processor seconds"))
READING = """
All bounds are exact and hold every constant: they are ELBOs in nats, and at most the evidence. The gap is what a guide's bound
lacks of the best that factors of its family have for this model, whose value is known in closed form or by quadrature.

Published: the published learning rate, constant. Fair: every guide has each of the same rates, which fall to zero by a
cosine; of these the table shows the one with the smallest gap, and by "soonest" the one that is the first within 1 % of the
best loss. Seeds draw initial values and noise; the data are the same. Means over seeds with their standard errors. Gradients
are those of StickingTheLandingELBO for every guide; published is the plain one, with 100 draws a step.

Seconds: processor time of one thread from the end of the first step, compiling left out. One graph takes the steps of all
learning rates and seeds together, of which each has an equal part. One alone takes longer.
"""


@dataclass(frozen=True)
class Line:
    """One arm at one learning rate of a protocol: `bounds [seeds, looks]` in nats for all rows."""

    arm: str
    protocol: str
    rate: float
    rows: int
    looks: np.ndarray
    seconds: np.ndarray
    bounds: np.ndarray
    best: float
    evidence: float
    spread: float
    predicted: float | None

    @property
    def gap(self) -> Mean:
        """In nats a row, at the end."""
        return mean_over_seeds(Mean(float(gap) / self.rows, 0.0) for gap in self.gaps)

    @property
    def gaps(self) -> np.ndarray:
        """By seed what the last bounds lack of the best, in nats for all rows."""
        return self.best - self.bounds[:, -1]

    def soon(self, of: np.ndarray) -> list[Duration]:
        """By seed the steps or seconds until the loss is within 1 % of the best."""
        there = self.bounds >= self.best - NEAR * abs(self.best)
        return [Duration(float(of[row.argmax()]) if row.any() else float(of[-1]), not row.any()) for row in there]


def lines_of(records: Mapping[str, Mapping]) -> list[Line]:
    """By arm and protocol a line a learning rate."""
    found = []
    for record in records.values():
        result, settings = (lambda *path, r=record: pick(r, "result", *path)), record["settings"]
        runs: dict[tuple[str, float], list] = {}
        for run in result("runs"):
            runs.setdefault((run["protocol"], run["rate"]), []).append(run["bounds"])
        shared = [result(name) for name in ("best", "evidence", "spread", "predicted_loss")]
        for (protocol, rate), bounds in runs.items():
            curve = np.array(bounds, dtype=float)
            looks, seconds = np.array(result("looks")), np.array(result("seconds"))
            found.append(Line(settings["arm"], protocol, rate, settings["rows"], looks, seconds, curve, *shared))
    return found


def shown(lines: Iterable[Line]) -> list[Line]:
    """By arm the published learning rate, and of the fair ones that with the smallest gap."""
    best: dict[tuple[str, str], Line] = {}
    for line in lines:
        key = line.arm, line.protocol
        if key not in best or _mean_gap(line) < _mean_gap(best[key]):
            best[key] = line
    return [best[key] for key in sorted(best, key=lambda key: (key[1] != "published", _place(key[0])))]


def soonest(lines: Sequence[Line], line: Line) -> Line:
    """Of an arm's learning rates in a protocol the one that gets near the best first."""
    same = [each for each in lines if (each.arm, each.protocol) == (line.arm, line.protocol)]
    return min(same, key=lambda each: ((soon := median_duration(each.soon(each.looks))).censored, soon.value))


def _mean_gap(line: Line) -> float:
    """The mean gap, infinite where a seed diverged."""
    return float(np.nan_to_num(line.gaps.mean(), nan=np.inf))


def _place(arm: str) -> tuple:
    order = ("F-VI", "constant", "degree", "x_n", "window")
    return next(at for at, start in enumerate(order) if arm.startswith(start)), len(arm), arm


def document(
    records: Mapping[str, Mapping], *, title: str, lead: str, claims: Callable[[list[Line]], list[Note]], text: str
) -> Document:
    """The report of these records, by key.

    Args:
        records: of one sweep.
        title, lead: of the report.
        claims: what the lines that are shown answer.
        text: how the sweep's numbers are made, beyond what holds for all comparisons.
    """
    parts = []
    by_size: dict[tuple, dict[str, Mapping]] = {}
    for key, record in records.items():
        s = record["settings"]
        by_size.setdefault((s["rows"], s["steps"], s["draws"], len(s["seeds"])), {})[key] = record
    for (rows, steps, draws, seeds), some in sorted(by_size.items(), key=lambda pair: pair[0]):
        name = f"{rows:,} rows, {steps:,} steps, {draws} {'draw' if draws == 1 else 'draws'} a step, {seeds} seeds"
        parts.append(_part(name, lines_of(some), claims))
    return Document(title, lead, parts=[*parts, Document("How to read this", READING + "\n" + text)])


def _part(title: str, lines: list[Line], claims: Callable[[list[Line]], list[Note]]) -> Document:
    best = shown(lines)
    quick = {(line.arm, line.protocol): soonest(lines, line) for line in best}

    def soon(line: Line, of: str) -> Duration | None:
        chosen = quick[line.arm, line.protocol]
        return median_duration(chosen.soon(getattr(chosen, of)))

    known = [Column("closed form", lambda line: None if line.predicted is None else line.predicted / line.rows)]
    columns = [
        Column("protocol", lambda line: line.protocol),
        Column("guide", lambda line: line.arm),
        Column("rate", lambda line: line.rate),
        Column("gap, nats a row", lambda line: line.gap, text=lambda gap: _small(gap)),
        *(known if any(line.predicted is not None for line in best) else ()),
        Column("ELBO", lambda line: mean_over_seeds(Mean(float(b), 0.0) for b in line.bounds[:, -1]), "page"),
        Column("soonest rate", lambda line: quick[line.arm, line.protocol].rate, "page"),
        Column("steps to 1 %", lambda line: soon(line, "looks")),
        Column("seconds to 1 %", lambda line: soon(line, "seconds")),
    ]
    arms = sorted({line.arm for line in lines}, key=_place)
    figures = [
        Figure("curves", "Gap by step and by second", "To the best bound, a line a seed.", partial(_curves, best, arms)),
        Figure("soon", "Steps and seconds to 1 %", "Over seeds, each guide at its soonest rate; a cross: never in so many.",
               partial(_boxes, quick, arms)),
    ]  # fmt: skip
    table = Table(title, columns, best, group="protocol", file="summary")
    return Document(title, notes=claims(best), tables=[table], figures=figures)


def _small(gap: Mean) -> str:
    return f"{gap.value:.2g} ± {gap.se:.1g}" if gap.known and gap.value < 0.01 else str(gap)


def _colours(arms: Sequence[str]) -> dict[str, str]:
    fixed = {"F-VI": FACTORIZED, "constant": CONSTANT, "degree 0": CONSTANT}
    others = [arm for arm in arms if arm not in fixed]
    return {arm: fixed.get(arm) or colour for arm, colour in [
        *((arm, "") for arm in arms if arm in fixed), *zip(others, ramp(len(others)), strict=True)]}  # fmt: skip


@drawn
def _curves(lines: Sequence[Line], arms: Sequence[str]) -> Drawing:
    """A row for steps and one for seconds, a column a protocol."""
    figure, grid = panels(2, 2, sharey=True, sharex="row")
    colours = _colours(arms)
    for row, (of, label) in zip(grid, MEASURES, strict=True):
        for axes, protocol in zip(row, ("published", "fair"), strict=True):
            for line in lines:
                for bounds in line.bounds if line.protocol == protocol else ():
                    gap = np.maximum((line.best - bounds) / line.rows, 1e-6)
                    axes.plot(getattr(line, of)[1:], gap[1:], color=colours[line.arm], lw=1.0)
            near = NEAR * abs(lines[0].best) / lines[0].rows
            axes.axhline(near, color=INK, lw=0.8, ls=":")
            axes.set(xscale="log", yscale="log", xlabel=label, title=protocol if of == "looks" else "")
        row[0].set_ylabel("gap, nats a row")
    handles = [Line2D([], [], color=colours[arm], label=arm) for arm in arms]
    legend(figure, [*handles, Line2D([], [], color=INK, ls=":", label="1 % of the loss")], 5)
    return figure


@drawn
def _boxes(quick: Mapping[tuple[str, str], Line], arms: Sequence[str]) -> Drawing:
    """A row for steps and one for seconds, a column a protocol, a box an arm."""
    figure, grid = panels(2, 2, sharey=True, sharex="row")
    colours = _colours(arms)
    for row, (of, label) in zip(grid, MEASURES, strict=True):
        for axes, protocol in zip(row, ("published", "fair"), strict=True):
            for at, arm in enumerate(arms):
                line = quick[arm, protocol]
                _box(axes, at, line.soon(getattr(line, of)), colours[arm])
            axes.set(xlabel=label, title=protocol if of == "looks" else "", yticks=range(len(arms)))
            axes.set_yticklabels(arms)
            axes.set_ylim(len(arms) - 0.4, -0.6)
            fit_scale(axes.xaxis, [each.value for line in quick.values() for each in line.soon(getattr(line, of))])
    return figure


def _box(axes: Axes, at: int, times: Sequence[Duration], colour: str) -> None:
    """The box of an arm's seeds, or a cross where none was near in time."""
    if all(each.censored for each in times):
        axes.plot([times[0].value], [at], "x", color=colour)
        return
    flier = {"marker": "o", "markeredgecolor": colour, "ms": 5}
    values = [[each.value for each in times]]
    box = axes.boxplot(values, positions=[at], orientation="horizontal", widths=0.6, flierprops=flier)
    for part in (*box["boxes"], *box["medians"], *box["whiskers"], *box["caps"]):
        part.set_color(colour)
