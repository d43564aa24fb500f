"""The figures of all sweeps: curves in panels, dots with intervals; and the style, the axes and the legend of any other."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

INK = "#22272e"
CONSTANT, FACTORIZED, CONTINUED = "#7d828b", "#d1490c", "#9b3d8f"
#: Light green over teal to navy: ordered in lightness, hence also in grey and for every kind of colour vision.
RAMP = ("#86b944", "#33a58d", "#2382b5", "#2b4ea2", "#1d2360")
#: Kinds without an order, told apart by most kinds of colour vision (after Okabe and Ito).
HUES = ("#0072b2", "#e69f00", "#009e73", "#d1490c", "#cc79a7", "#56b4e9", "#7d828b", "#1d2360", "#a8a000", "#8a4b1f")
STYLE = Path(__file__).parent / "templates" / "figure.mplstyle"


def ramp(count: int) -> list[str]:
    """So many colours of the ramp, as far apart as they can be.

    >>> ramp(2) == [RAMP[0], RAMP[-1]], ramp(0)
    (True, [])
    """
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("ramp", RAMP)
    return [matplotlib.colors.to_hex(colour) for colour in colours([0.5] if count == 1 else np.linspace(0, 1, count))]


def hues(count: int) -> list[str]:
    """Colours of so many kinds that have no order; from the eleventh on they come again.

    >>> hues(2) == list(HUES[:2])
    True
    """
    return [HUES[at % len(HUES)] for at in range(count)]


def drawn(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Decorates a function that draws a figure: in the style of all, and returned as the bytes of a PNG."""

    @functools.wraps(draw)
    def png(*args: object, **kwargs: object) -> bytes:
        with matplotlib.rc_context(fname=STYLE):
            canvas = FigureCanvasAgg(draw(*args, **kwargs))
            canvas.draw()
            return packed(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))

    return png


def packed(image: Image.Image) -> bytes:
    """The picture as a small PNG that holds nothing but the picture, so that equal records give equal files."""
    # Lines and text get by on a palette; photographs, told by their many colours, keep all of theirs.
    if image.getcolors(2**14) is not None:
        image = image.quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def panels(
    rows: int, columns: int, *, width: float = 4.3, height: float = 2.8, **kwargs: object
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; `width` and `height` of one panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


class Curve(NamedTuple):
    """Points joined by a line, perhaps with standard errors; a dot ends it, or a cross where it `broke` off."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    se: Sequence[float] | None = None
    broke: bool = False


class Panel(NamedTuple):
    """Curves on axes `x` and `y`, and a horizontal line at a `level` that is `named` and no curve's."""

    x: str
    y: str
    curves: Sequence[Curve]
    title: str = ""
    level: float = math.nan
    named: str = ""


@drawn
def curves(grid: Sequence[Sequence[Panel]], *, low: float | None = None) -> Figure:
    """Rows of panels. Those that have the same `y` share its scale, and of these those that have the same `x` share that.

    In view is where curves end: y from `low`, failing that a little below the lowest end, and x from where the first comes in.
    """
    figure, places = panels(len(grid), len(grid[0]))
    every = [panel for row in grid for panel in row]
    for axes, panel in zip(places.flat, every, strict=True):
        for curve in panel.curves:
            style = {"color": curve.colour, "lw": 1.2, "ls": (0, (3, 2)) if curve.broke else "-"}
            axes.errorbar(curve.x, curve.y, curve.se, **style, capsize=2)
            marker = {"marker": "x", "ms": 7, "mew": 1.8} if curve.broke else {"marker": "o", "ms": 4}
            axes.plot(curve.x[-1:], curve.y[-1:], color=curve.colour, zorder=3, **marker)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        _view(axes, panel.x, [other for other in every if other.y == panel.y], low)
        if math.isfinite(panel.level):
            axes.axhline(panel.level, color=INK, lw=0.9, ls=(0, (2, 2)), zorder=1)
            place = {"xytext": (2, 2), "textcoords": "offset points", "annotation_clip": True}
            axes.annotate(panel.named, (0, panel.level), xycoords=("axes fraction", "data"), **place, fontsize=7.5)
    colours = {curve.label: curve.colour for panel in every for curve in panel.curves}
    legend(figure, [Line2D([], [], color=colours[label], label=label) for label in colours], 3 * len(grid[0]))
    return figure


def _view(axes: Axes, x: str, alike: Sequence[Panel], low: float | None) -> None:
    shown = [curve for panel in alike for curve in panel.curves if len(curve.x)]
    ends = [*(curve.y[-1] for curve in shown if not curve.broke), *(panel.level for panel in alike)]
    ends = [end for end in ends if math.isfinite(end)]
    if not ends or not shown:
        return
    span = np.ptp(ends) or abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - 0.25 * span if low is None else low, max(ends) + 0.1 * span)
    shown = [(np.asarray(each.x), np.asarray(each.y)) for panel in alike if panel.x == x for each in panel.curves]
    bottom, top = axes.get_ylim()
    seen = [places[(bottom <= values) & (values <= top) & (places > 0)] for places, values in shown]
    left = 0.8 * min((places[0] for places in seen if len(places)), default=1.0)
    right = 1.05 * max(places[-1] for places, _ in shown if len(places))
    fit_scale(axes.xaxis, [left, right])
    axes.set_xlim(left if axes.get_xscale() == "log" else 0.0, right)


@drawn
def dots(
    labels: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], x: str, *, log: bool = False
) -> Figure:
    """A row a label, from top to bottom, and in it a dot with its interval (value, low, high) for each of the series."""
    figure, ((axes,),) = panels(1, 1, width=7.2, height=0.6 + len(labels) * (0.16 + 0.09 * len(series)))
    rows, colours = np.arange(len(labels)), ramp(len(series))
    for number, (label, triples) in enumerate(series.items()):
        values, lows, highs = np.array(triples, float).T
        place, errors = rows + 0.6 * ((number + 0.5) / len(series) - 0.5), [values - lows, highs - values]
        axes.errorbar(values, place, xerr=errors, fmt="o", color=colours[number], ms=4, lw=1.4, label=label)
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.hlines(rows[1:] - 0.5, 0, 1, transform=axes.get_yaxis_transform(), color="#c9ced6", lw=0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel(x)
    if log:
        fit_scale(axes.xaxis, [triple[0] for triples in series.values() for triple in triples])
    legend(figure, axes.get_legend_handles_labels()[0], 4)
    return figure


def legend(figure: Figure, handles: Iterable[Artist], columns: int) -> None:
    """One legend above all panels."""
    figure.legend(handles=list(handles), loc="outside upper center", ncols=columns)


def fit_scale(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic axis where the positive values span more than a decade and a half; plain numbers in any case."""
    positive = [value for value in values if np.isfinite(value) and value > 0]
    if positive and max(positive) > 30 * min(positive):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0,) if max(positive) > 500 * min(positive) else (1.0, 3.0)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
