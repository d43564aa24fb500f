"""The report of the sweep `gradients`: variances beside what theory says of them, and the bound that each estimator reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import Curve, Panel, curves, drawn, hues, legend, panels
from experiments.reporting.records import pick
from experiments.reporting.statistics import Mean, mean_over_seeds
from experiments.reporting.tables import Column, Table
from experiments.sweeps.gradients.cells import best_rate

__all__ = ["document"]

# The closed forms that this many standard errors are to hold.
_ALLOWED = 5.0
# What sets the parts of the trainings apart.
_LENGTH = ("dataset", "latents", "steps", "seconds")
# Variances that are rounding, and stand for zero.
_ROUNDING = 1e-20
READING = """
Variance: of the gradient of one evaluation. In the closed forms of one element of it, over rows with equal parameters, which
are as many draws; in the linear model the sum over the table of the guide, at the best factors of every row (distance 0) or
with every mean so many posterior standard deviations away. Variances of 1e-20 and less are rounding, and stand for zero.

Seconds: of the processor, without the evaluations of the bound; all steps are eager, on one thread. ELBO: of up to 500 test
rows, in nats a row, ± over seeds. Equal seconds: those of the estimator whose trainings were over first. Trials of rates:
each a fifth as long as a training, by a seed of its own; while the best is on the edge of those tried, the next is tried.
"""
_LEADS = {
    "normal": "f(z) = -|z|²/2 under q = N(mean, I_D), the gradient in the mean.",
    "coin": "f(1) = 2 and f(0) = 0.3 under q = Bernoulli(p), the gradient in the log odds.",
}


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    by_kind: dict[object, list[Mapping]] = {}
    for record in records.values():
        by_kind.setdefault(pick(record, "settings", "kind"), []).append(record)
    parts = [_known(kind, by_kind[kind]) for kind in ("normal", "coin") if kind in by_kind]
    parts += [_linear(by_kind["linear"])] if "linear" in by_kind else []
    parts += list(_trainings(by_kind.get("training", []), by_kind.get("trials", [])))
    return Document(
        title="Pathwise or score function",
        lead="How noisy estimators of the same gradient are, and what that costs in training.",
        notes=[note for part in parts for note in part.notes],
        parts=[
            *(Document(p.title, p.lead, (), p.tables, p.figures) for p in parts),
            Document("How to read this", READING),
        ],
    )


def _lines(records: Sequence[Mapping], *settings: str) -> list[dict]:
    """The lines of all records, with these of their settings, ordered by them."""
    found = [
        {name: pick(record, "settings", name) for name in settings} | dict(line)
        for record in records
        for line in pick(record, "result", "lines")
    ]
    return sorted(found, key=lambda line: [line[name] for name in settings])


def _variance(line: Mapping) -> Mean:
    return Mean(line["variance"], line["se"], 1) if line["variance"] > _ROUNDING else Mean(0.0, seeds=1)


def _known(kind: str, records: Sequence[Mapping]) -> Document:
    """Variances beside their closed forms."""
    axes = ("dim", "mu") if kind == "normal" else ("p",)
    lines = _lines(records, *axes)
    held = [line for line in lines if line["expected"] is not None]
    off = [abs(line["variance"] - line["expected"]) / max(line["se"], 1e-12) for line in held]
    title = "Normal draws" if kind == "normal" else "Coins"
    inside = sum(each <= _ALLOWED for each in off)
    note = Note(
        "answer" if inside == len(held) else "warning",
        f"{inside} of {len(held)} measured variances within {_ALLOWED:.0f} standard errors of their closed form, the worst at "
        f"{max(off, default=0.0):.1f}.",
        title,
    )
    columns = [
        *(Column({"dim": "D", "mu": "mean"}.get(name, name), lambda line, name=name: line[name]) for name in axes),
        Column("estimator", lambda line: _name(line["estimator"])),
        Column("variance", _variance),
        Column("closed form", lambda line: None if line["expected"] is None else float(line["expected"])),
        Column("evaluations", lambda line: float(line["evaluations"])),
    ]
    grids = (
        [("D", "dim", [li for li in lines if li["mu"] == 0]), ("mean", "mu", [li for li in lines if li["dim"] == 1])]
        if kind == "normal"
        else [("p", "p", lines)]
    )
    caption = "Dots: measured. Lines: closed forms; dotted where none is known. What is zero is left out."
    figure = Figure("variance", "Variance of the gradient", caption, partial(_drawing, grids))
    table = Table(title, columns, lines, group=columns[0].name, file="closed_forms")
    return Document(title, _LEADS[kind], [note], [table], [figure])


def _linear(records: Sequence[Mapping]) -> Document:
    """The linear model, at and away from its best factors."""
    lines = _lines(records, "off", "latent_dim", "num_rows")
    columns = [
        Column("distance", lambda line: float(line["off"])),
        Column("latents", lambda line: line["latent_dim"]),
        Column("rows", lambda line: line["num_rows"]),
        Column("estimator", lambda line: _name(line["estimator"])),
        Column("bound", lambda line: line["bound"], "page"),
        Column("variance", _variance),
        Column("signal / noise", lambda line: None if line["variance"] < _ROUNDING else line["snr"]),
        Column("evaluations", lambda line: float(line["evaluations"])),
    ]
    base = {"off": 1.0, "latent_dim": 2, "num_rows": 50}
    names = {"off": "distance from the best factors", "latent_dim": "latents a row", "num_rows": "rows"}
    grids = [
        (names[name], name, [line for line in lines if all(line[o] == v for o, v in base.items() if o != name)])
        for name in names
    ]
    at_best = {line["estimator"] for line in lines if line["off"] == 0 and line["variance"] < _ROUNDING}
    text = f"Without noise at the best factors: {', '.join(sorted(map(_name, at_best))) or 'none'}."
    figure = Figure(
        "variance", "Variance of the gradient", "What is zero but for rounding is left out.", partial(_drawing, grids)
    )
    table = Table("A linear model", columns, lines, group="distance", file="linear")
    lead = "Factor analysis with orthogonal loadings, whose posterior the factorized guide contains; the gradient in its table."
    return Document("A linear model", lead, [Note("answer", text, "A linear model")], [table], [figure])


def _name(estimator: str) -> str:
    return estimator.replace("_", " ")


@drawn
def _drawing(grids: Sequence[tuple[str, str, Sequence[Mapping]]]) -> Drawing:
    """Variances on logarithmic axes: dots, their lines or, where they are known, those of the closed forms."""
    figure, (places,) = panels(1, len(grids), height=3.2)
    seen = [line for _, _, lines in grids for line in lines if line["variance"] > _ROUNDING]
    labels = list(dict.fromkeys(line["estimator"] for line in seen))
    colours = dict(zip(labels, hues(len(labels)), strict=True))
    markers = dict(zip(labels, "osD^vP*Xhd<>"[: len(labels)].ljust(len(labels), "o"), strict=True))
    for axes, (title, x, lines) in zip(places, grids, strict=True):
        for label, own in _by([line for line in lines if line["variance"] > _ROUNDING], "estimator"):
            own = sorted(own, key=lambda line: line[x])
            at, values, se = (np.array([line[name] for line in own], float) for name in (x, "variance", "se"))
            known = [(line[x], line["expected"]) for line in own if line.get("expected")]
            style = {"color": colours[label], "ms": 4, "marker": markers[label], "capsize": 2}
            axes.errorbar(at, values, se, ls="" if known else (0, (1, 2)), lw=1.0, **style)
            if known:
                axes.plot(*zip(*known, strict=True), color=colours[label], lw=1.2)
        axes.set(xlabel=title, ylabel="variance", yscale="log")
        if x in ("dim", "latent_dim", "num_rows"):
            axes.set_xscale("log", base=2 if x != "num_rows" else 10)
    handles = [Line2D([], [], color=colours[each], marker=markers[each], ms=4, label=_name(each)) for each in labels]
    legend(figure, handles, 4 if len(grids) > 1 else 2)
    return figure


def _by(lines: Sequence[Mapping], name: str) -> Iterator[tuple[str, list[Mapping]]]:
    ordered = sorted(lines, key=lambda line: line[name])
    yield from ((key, list(group)) for key, group in groupby(ordered, key=lambda line: line[name]))


def _trainings(records: Sequence[Mapping], trials: Sequence[Mapping]) -> Iterator[Document]:
    """A part for each data set, kind of latents and length in steps or in seconds."""
    by_part: dict[tuple, list[dict]] = {}
    for record in records:
        result = {"curve": pick(record, "result", "curve"), "diverged_at": record["result"].get("diverged_at")}
        line = {**record["settings"], **result}
        by_part.setdefault(tuple(line.get(name) for name in _LENGTH), []).append(line)
    for (dataset, latents, *_), lines in sorted(by_part.items(), key=lambda item: tuple(map(str, item[0]))):
        alike = {name: lines[0][name] for name in ("dataset", "latents", "latent_dim", "widths", "batch_size")}
        own = [each for each in trials if alike.items() <= each["settings"].items()]
        yield _training(f"{dataset}, {latents} latents", _labelled(lines), own)


def _labelled(lines: Sequence[Mapping]) -> list[dict]:
    """The trainings with a label each: the estimator, and its rate where it has several."""
    rates: dict[str, set[float]] = {}
    for line in lines:
        rates.setdefault(line["estimator"], set()).add(line["lr"])
    several = {name for name, own in rates.items() if len(own) > 1}
    of_rate = {line["lr"]: f" at {line['lr']:g}" for line in lines}
    return [
        line | {"label": line["estimator"] + of_rate[line["lr"]] * (line["estimator"] in several)} for line in lines
    ]


def _training(title: str, lines: Sequence[Mapping], trials: Sequence[Mapping]) -> Document:
    diverged = [line for line in lines if line["diverged_at"] is not None]
    found = list(_by([line for line in lines if line["diverged_at"] is None], "label"))
    notes = [_diverged(title, diverged)] if diverged else []
    if not found:
        return Document(title, notes=notes)
    table, text = _ranking(title, found)
    grid = [Panel("steps", "ELBO of test rows, nats a row", _curves(found, "step")),
            Panel("seconds", "ELBO of test rows, nats a row", _curves(found, "seconds"))]  # fmt: skip
    s = lines[0]
    layers = "-".join(map(str, [s["latent_dim"], *s["widths"]]))
    rates = f"at {s['lr']:g} for all" if len({line["lr"] for line in lines}) == 1 else "at the rate of the table"
    lead = f"A decoder of {layers}, batches of {s['batch_size']}, Adam {rates}, K = {s['num_particles']} draws."
    figure = Figure(
        "elbo", "ELBO by steps and seconds", "Means over the seeds, ± one standard error.", partial(curves, [grid])
    )
    notes.insert(0, Note("answer", text, title))
    return Document(title, lead, notes, [table, *([_tried(title, trials)] if trials else [])], [figure])


def _ranking(title: str, found: Sequence[tuple[str, Sequence[Mapping]]]) -> tuple[Table, str]:
    """The estimators in the order of their bound after equal seconds, and that order in words."""
    ends = {name: [run["curve"][-1] for run in runs] for name, runs in found}
    last = {name: mean_over_seeds(Mean(end["seconds"]) for end in own) for name, own in ends.items()}
    taken = {name: mean_over_seeds(Mean(float(end["step"])) for end in own) for name, own in ends.items()}
    equal = min(each.value for each in last.values())
    then = {name: mean_over_seeds(Mean(_at(run["curve"], equal)) for run in runs) for name, runs in found}
    order = sorted(then, key=lambda name: -then[name].value)
    columns = [
        Column("estimator", _name),
        Column("seeds", lambda name: then[name].seeds),
        Column(f"ELBO after {equal:.2g} s", lambda name: then[name], best=max),
        Column("ms a step", lambda name: 1e3 * last[name].value / taken[name].value),
    ]
    rates = {name: runs[0]["lr"] for name, runs in found}
    if len(set(rates.values())) > 1:
        columns.insert(1, Column("rate", lambda name: f"{rates[name]:g}"))
    if "steps" in found[0][1][0]:
        bounds = {name: mean_over_seeds(Mean(end["elbo"]) for end in own) for name, own in ends.items()}
        columns.insert(-1, Column(f"ELBO after {found[0][1][0]['steps']:,} steps", lambda name: bounds[name], best=max))
    else:
        columns.insert(-1, Column("steps", lambda name: round(taken[name].value)))
    text = f"After equal seconds: {', '.join(f'{_name(each)} {then[each]}' for each in order)}."
    return Table(title, columns, order, file="training"), text


def _tried(title: str, trials: Sequence[Mapping]) -> Table:
    """The rates that were tried for each estimator, and what they came to."""
    lines = [
        {"estimator": pick(each, "settings", "estimator"), "best": best_rate(pick(each, "result", "trials")), **trial}
        for each in sorted(trials, key=lambda each: each["settings"]["estimator"])
        for trial in sorted(pick(each, "result", "trials"), key=lambda trial: trial["lr"])
    ]
    columns = [
        Column("estimator", lambda line: _name(line["estimator"])),
        Column("rate", lambda line: f"{line['lr']:g}"),
        Column("ELBO of training rows", lambda line: "diverged" if line["elbo"] is None else line["elbo"]),
        Column("best", lambda line: "yes" if line["lr"] == line["best"] else ""),
    ]
    return Table(f"{title}: trials of rates", columns, lines, group="estimator", file="trials")


def _diverged(title: str, runs: Sequence[Mapping]) -> Note:
    told = [f"{_name(run['estimator'])}, seed {run['seed']}, at step {run['diverged_at']}" for run in runs]
    return Note("warning", f"Diverged, left out: {'; '.join(told)}.", title)


def _at(curve: Sequence[Mapping], seconds: float) -> float:
    return float(np.interp(seconds, [point["seconds"] for point in curve], [point["elbo"] for point in curve]))


def _curves(found: Sequence[tuple[str, Sequence[Mapping]]], x: str) -> list[Curve]:
    drawn_curves = []
    for (name, runs), colour in zip(found, hues(len(found)), strict=True):
        points = list(zip(*(run["curve"] for run in runs), strict=True))
        values = [mean_over_seeds(Mean(point["elbo"]) for point in each) for each in points]
        places = [float(np.mean([point[x] for point in each])) for each in points]
        drawn_curves.append(Curve(_name(name), colour, places, [v.value for v in values], [v.se for v in values]))
    return drawn_curves
