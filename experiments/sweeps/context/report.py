"""The report of the sweep `context`: measured gaps on the curves of the closed form."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure as Drawing
from scipy.optimize import least_squares

from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import drawn, panels, ramp
from experiments.reporting.records import pick
from experiments.reporting.statistics import Mean
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

#: A measured gap is on its curve if it is within so many of its standard errors.
MOST = 5.0
READING = """
Chain: z_t ~ N(phi z_{t-1}, q^2), x_t ~ N(z_t, r^2), stationary. Process: a Matern 3/2 kernel of that length on a grid of
spacing 1, seen through noise of scale r. An encoder reads x_{n-w} to x_{n+w} and is linear, as the best factors are. Each is
trained on series drawn anew at every step and measured on others. The gap is what it loses beyond independent normals, exact
for each series, in nats for a row; the standard error is over series.

The closed form is the least that an encoder of that window can lose on average: a linear map with zeros beyond the ends, and
one scale. Training can only lose more.

Rate of a chain: rho of a rho^w + c, fitted to the logarithms of the gaps of windows that hold neighbours; c is what rows near
the ends lose. By theory a value beyond the window moves a posterior mean by lambda^w, the share that each row of a smoother
passes on, with lambda + 1 / lambda = (1 + phi^2 + q^2 / r^2) / phi, and the gap is of degree two in it: rho tends to lambda^2
for wide windows.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key."""
    by_size: dict[tuple[int, int], list[Mapping]] = {}
    for record in records.values():
        pick(record, "result", "windows")
        by_size.setdefault((record["settings"]["rows"], record["settings"]["steps"]), []).append(record)
    parts = [_part(f"{rows:,} rows, {steps:,} steps", by_size[rows, steps]) for rows, steps in sorted(by_size)]
    return Document(
        title="How far an encoder has to look",
        lead="The gap of an encoder that reads a window around its row, where the best factor depends on the whole series.",
        parts=[*parts, Document("How to read this", READING)],
    )


def _part(title: str, records: Sequence[Mapping]) -> Document:
    found = sorted(
        ((record, line) for record in records for line in record["result"]["windows"]),
        key=lambda pair: (_name(pair[0]), pair[1]["window"]),
    )
    columns = [
        Column("model", lambda pair: _name(pair[0])),
        Column("half-width", lambda pair: pair[1]["window"]),
        Column("closed form, nats a row", lambda pair: pair[1]["closed_form"] / _rows(pair[0])),
        Column("measured", lambda pair: _gap(*pair)),
        Column("standard errors apart", lambda pair: _apart(pair[1]), text="{:.1f}".format),
    ]
    figure = Figure("gaps", "Gap by half-width", "Lines: the closed form. Dots: measured, with 2 standard errors.",
                    partial(_curves, found))  # fmt: skip
    table = Table(title, columns, found, group="model", file="summary")
    return Document(title, notes=_claims(found), tables=[table], figures=[figure])


def _claims(found: list[tuple[Mapping, Mapping]]) -> list[Note]:
    on = [pair for pair in found if abs(_apart(pair[1])) <= MOST]
    models = {_name(record) for record, _ in found}
    whole = models - {_name(record) for record, line in found if abs(_apart(line)) > MOST}
    text = (
        f"{len(on)} of {len(found)} measured gaps are within {MOST:.0f} standard errors of the closed form, and all of "
        f"{len(whole)} of {len(models)} models."
    )
    notes = [Note("answer" if len(on) == len(found) else "warning", text)]
    for name in sorted(name for name in models if name.startswith("chain")):
        own = [(record, line) for record, line in found if _name(record) == name and line["window"] > 0]
        windows = [line["window"] for _, line in own]
        if len(own) < 4 or min(line["gap"] for _, line in own) <= 0:
            continue
        measured, closed = (_fitted_rate(windows, [line[of] for _, line in own]) for of in ("gap", "closed_form"))
        notes.append(
            Note(
                "answer",
                f"{name}: the gap falls geometrically, at a fitted rate of {measured:.3f} a row on both sides; that of the "
                f"closed form is {closed:.3f}, the limit for wide windows {_limit(own[0][0]):.3f}.",
            )
        )
    return notes


def _fitted_rate(windows: Sequence[int], gaps: Sequence[float]) -> float:
    """``rho`` of ``a rho^w + c`` by least squares of logarithms; all three are positive, and ``rho`` is below 1."""
    at, logs = np.array(windows, dtype=float), np.log(gaps)

    def off(numbers: np.ndarray) -> np.ndarray:
        return np.logaddexp(numbers[0] - np.exp(numbers[1]) * at, numbers[2]) - logs

    start = [logs[0], 0.0, logs[-1] - np.log(2.0)]
    return float(np.exp(-np.exp(least_squares(off, start).x[1])))


def _limit(record: Mapping) -> float:
    """``lambda^2`` of a chain."""
    phi, q, r = record["settings"]["numbers"]
    total = (1 + phi**2 + (q / r) ** 2) / phi
    return ((total - (total**2 - 4) ** 0.5) / 2) ** 2


def _name(record: Mapping) -> str:
    s = record["settings"]
    names = ("phi", "q", "r") if s["model"] == "chain" else ("length", "r")
    return s["model"] + " " + ", ".join(f"{name} {number:g}" for name, number in zip(names, s["numbers"], strict=True))


def _rows(record: Mapping) -> int:
    return record["settings"]["rows"]


def _gap(record: Mapping, line: Mapping) -> Mean:
    return Mean(line["gap"] / _rows(record), line["se"] / _rows(record), 1)


def _apart(line: Mapping) -> float:
    return (line["gap"] - line["closed_form"]) / line["se"]


@drawn
def _curves(found: list[tuple[Mapping, Mapping]]) -> Drawing:
    """A panel a kind of model, a line a model."""
    kinds = sorted({record["settings"]["model"] for record, _ in found})
    figure, grid = panels(1, len(kinds), sharey=True)
    for axes, kind in zip(grid[0], kinds, strict=True):
        names = sorted({_name(record) for record, _ in found if record["settings"]["model"] == kind})
        for name, colour in zip(names, ramp(len(names)), strict=True):
            lines = [(line, _gap(record, line), _rows(record)) for record, line in found if _name(record) == name]
            at = [line["window"] for line, _, _ in lines]
            axes.plot(
                at, [line["closed_form"] / rows for line, _, rows in lines], color=colour, label=name.removeprefix(kind)
            )
            axes.errorbar(
                at, [g.value for _, g, _ in lines], [2 * g.se for _, g, _ in lines], fmt="o", ms=4, color=colour
            )
        axes.set_xticks(sorted({line["window"] for record, line in found if record["settings"]["model"] == kind}))
        axes.set(yscale="log", xlabel="rows read on either side", title=kind)
        axes.legend()
    grid[0][0].set_ylabel("amortization gap, nats a row")
    return figure
