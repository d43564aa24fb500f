"""Drawing helpers that sweeps share: style, one colour a guide, panels, labels at the ends of lines."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

INK, FAINT = "#22272e", "#c9ced6"
CONSTANT, FACTORIZED, CONTINUED = "#7d828b", "#d1490c", "#9b3d8f"
#: Light green over teal to navy: ordered in lightness, hence also in grey and for every kind of colour vision.
RAMP = ("#86b944", "#33a58d", "#2382b5", "#2b4ea2", "#1d2360")
DPI = 150
#: Of the names at the ends of lines, in points.
LABEL_SIZE = 8
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": False,
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
}


def styled() -> AbstractContextManager[None]:
    """The style of every figure; wraps the drawing of one and leaves matplotlib's settings alone."""
    return matplotlib.rc_context(STYLE)


def drawn(draw: Callable[..., Figure]) -> Callable[..., bytes]:
    """Decorates a function that draws a figure: styled, and returned as the bytes of a PNG."""

    @functools.wraps(draw)
    def png(*args: object, **kwargs: object) -> bytes:
        with styled():
            figure = draw(*args, **kwargs)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            return packed(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))

    return png


def packed(image: Image.Image) -> bytes:
    """The picture as a small PNG that holds nothing but the picture, so that equal records give equal files."""
    # Lines and text get by on a palette; photographs, told by their many colours, keep all of theirs.
    if image.getcolors(2**14) is not None:
        image = image.quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, dpi=(DPI, DPI))
    return buffer.getvalue()


def palette(labels: Sequence[str]) -> dict[str, str]:
    """The colour of each guide, the same in every figure of a report: pass every label that the report shows.

    >>> palette(["A-VI k=64", "A-VI k=1", "F-VI"]) == {"A-VI k=1": RAMP[0], "A-VI k=64": RAMP[-1], "F-VI": FACTORIZED}
    True
    """
    others = {label: CONTINUED for label in labels if label.startswith("F-VI from")}
    others |= {"constant": CONSTANT, "F-VI": FACTORIZED}
    known = set(labels)
    amortized = sorted(known - others.keys(), key=lambda label: int(re.search(r"\d+$", label)[0]))
    places = [0.5] if len(amortized) == 1 else np.linspace(0, 1, len(amortized))
    ramp = matplotlib.colors.LinearSegmentedColormap.from_list("width", RAMP)
    colours = {label: matplotlib.colors.to_hex(ramp(place)) for label, place in zip(amortized, places, strict=True)}
    return colours | {label: colour for label, colour in others.items() if label in known}


def panels(
    rows: int, columns: int, *, width: float = 4.8, height: float = 2.9, **kwargs: object
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns]; `width` and `height` of one panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names lines at the right edge: (y, text, colour) each, moved apart as little as keeps them readable."""
    inside = [end for end in ends if np.isfinite(end[0])]
    if not inside:
        return
    inside.sort()
    # Only a figure that has been laid out knows how high its axes are.
    if engine := axes.figure.get_layout_engine():
        engine.execute(axes.figure)
    height = axes.get_position().height * axes.figure.get_size_inches()[1] * 72
    gap = 1.3 * LABEL_SIZE / height
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = np.array([to_axes.transform((axes.get_xlim()[1], y))[1] for y, _, _ in inside])
    placed = apart(wanted, gap)
    for (_, text, colour), y, place in zip(inside, wanted, placed, strict=True):
        leader = [1.0, 1.025], [min(max(y, 0.0), 1.0), place]
        axes.plot(*leader, color=colour, lw=0.8, alpha=0.6, transform=axes.transAxes, clip_on=False)
        axes.text(1.035, place, text, color=colour, fontsize=LABEL_SIZE, va="center", transform=axes.transAxes)


def apart(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Places in [0, 1] at least `gap` apart and, in least squares, nearest to the ascending `wanted`.

    >>> apart([0.2, 0.2, 0.9], 0.1).round(2).tolist()
    [0.15, 0.25, 0.9]
    """
    steps = gap * np.arange(len(wanted))
    pools: list[list[float]] = []
    # Isotonic regression of wanted - steps: neighbours in the wrong order share their mean.
    for value in wanted - steps:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = np.concatenate([np.full(len(pool), np.mean(pool)) for pool in pools])
    return np.clip(level, 0.0, max(1.0 - steps[-1], 0.0)) + steps


def fit_scale(axis: Axis, values: Iterable[float]) -> None:
    """A logarithmic axis where the positive values span more than a decade and a half; plain numbers in any case."""
    positive = [value for value in values if np.isfinite(value) and value > 0]
    if positive and max(positive) > 30 * min(positive):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1.0,) if max(positive) > 500 * min(positive) else (1.0, 3.0)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
