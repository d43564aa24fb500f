"""Drawing helpers that sweeps share: style, colours, panels, axes, a legend above."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

INK = "#22272e"
CONSTANT, FACTORIZED, CONTINUED = "#7d828b", "#d1490c", "#9b3d8f"
#: Light green over teal to navy: ordered in lightness, hence also in grey and for every kind of colour vision.
RAMP = ("#86b944", "#33a58d", "#2382b5", "#2b4ea2", "#1d2360")
STYLE = Path(__file__).parent / "templates" / "figure.mplstyle"


def ramp(count: int) -> list[str]:
    """So many colours of the ramp, as far apart as they can be.

    >>> ramp(2) == [RAMP[0], RAMP[-1]]
    True
    """
    places = [0.5] if count == 1 else np.linspace(0, 1, count)
    colours = matplotlib.colors.LinearSegmentedColormap.from_list("ramp", RAMP)
    return [matplotlib.colors.to_hex(colours(place)) for place in places]


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
