"""The figure of gaps: parts by guide, distribution over rows, rows that lose most."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_avi.display.figures import new_figure

__all__ = ["plot_gaps"]

_APPROXIMATION, _RICHER, _AMORTIZATION, _SLACK = "#4477aa", "#99bbdd", "#ee6677", "#bbbbbb"
_GUIDES = ["#332288", "#117733", "#cc6677", "#ddaa33", "#44aa99", "#882255"]


def plot_gaps(gaps: Mapping, *, images: Tensor | None = None, worst: int = 10):
    """Draw gaps by guide; of several guides, the rows that lose most are those of the first.

    Args:
        gaps: :class:`~pyro_avi.Gaps` by the name of the guide.
        images: ``[N, height, width]``, drawn beside the rows that lose most.
        worst: how many of these.

    Returns:
        A :class:`matplotlib.figure.Figure`.

    Raises:
        ValueError: if there are not as many images as rows.
    """
    first = next(iter(gaps.values()))
    if images is not None and len(images) != len(first.elbo.rows):
        raise ValueError(f"Expected an image for each of the {len(first.elbo.rows)} rows, got {len(images)}.")
    figure = new_figure(figsize=(12, 4), layout="constrained")
    bars, rows, most = figure.subplots(1, 3)
    _bars(bars, gaps)
    _distribution(rows, gaps)
    _worst(most, first, images, worst)
    return figure


def _parts(measured, rows=None) -> list[tuple[str, str, Any]]:
    """Label, colour and what is drawn: means over rows, or the values of some rows."""

    def get(estimate):
        return estimate.per_row.value if rows is None else estimate.rows[rows].cpu().numpy()

    rest, parts = get(measured.approximation), []
    if measured.richer is not None:
        parts = [("approximation, closed by the richer family", _RICHER, get(measured.richer))]
        rest = rest - get(measured.richer)
    return [
        ("approximation", _APPROXIMATION, rest),
        *parts,
        ("amortization", _AMORTIZATION, get(measured.amortization)),
    ]


def _bars(axes, gaps) -> None:
    for position, measured in enumerate(gaps.values()):
        bottom, slack = 0.0, measured.slack.per_row.value
        for label, color, height in _parts(measured):
            axes.bar(position, height, bottom=bottom, color=color, width=0.6, label=label)
            bottom += height
        if slack > 0:
            style = {"color": "none", "edgecolor": _SLACK, "hatch": "//", "width": 0.6}
            axes.bar(position, slack, bottom=bottom, label="evidence above its bound", **style)
        # Side by side, so that one does not hide the other.
        split = measured.inference.per_row.value - measured.amortization.per_row.value
        axes.errorbar(position - 0.1, split, 2 * measured.approximation.per_row.se, color="black", capsize=4)
        axes.errorbar(position + 0.1, bottom, 2 * measured.inference.per_row.se, color="black", capsize=4)
    axes.set_xticks(range(len(gaps)), list(gaps))
    axes.set_xlim(-0.6, max(len(gaps) - 0.4, 1.4))
    # Room for the legend.
    axes.set_ylim(top=1.5 * axes.get_ylim()[1])
    axes.set_ylabel("nats a row")
    axes.set_title("Inference gap: mean, two standard errors")
    # Once, however many guides have it.
    labels = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(labels.values(), labels.keys(), frameon=False, fontsize="small", loc="upper right")


def _distribution(axes, gaps) -> None:
    for color, (name, measured) in zip(_GUIDES * len(gaps), gaps.items(), strict=False):
        for estimate, style in ((measured.inference, "-"), (measured.amortization, "--")):
            values = np.sort(estimate.rows.cpu().numpy())
            share = np.arange(1, len(values) + 1) / len(values)
            kind = "inference" if style == "-" else "amortization"
            axes.step(values, share, style, where="post", color=color, label=f"{name}: {kind}")
    axes.set_xlabel("gap of a row, nats")
    axes.set_ylabel("share of rows below")
    axes.set_title("Distribution over rows")
    axes.legend(frameon=False, fontsize="small", loc="lower right")


def _worst(axes, measured, images, worst: int) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    rows = measured.lost_most(worst)
    left = np.zeros(len(rows))
    for _, color, width in _parts(measured, rows):
        axes.barh(range(len(rows)), width, left=left, color=color)
        left = left + width
    flags = [f"{'' if measured.converged[row] else '*'}{'?' if measured.unreliable[row] else ''}" for row in rows]
    axes.set_yticks(range(len(rows)), [f"{row}{flag}" for row, flag in zip(rows.tolist(), flags, strict=True)])
    axes.invert_yaxis()
    axes.set_xlabel("nats")
    marks = {"*": "not converged", "?": "unreliable"}
    meanings = [f"{flag} {text}" for flag, text in marks.items() if any(flag in flags_of for flags_of in flags)]
    axes.set_ylabel(f"row ({', '.join(meanings)})" if meanings else "row")
    axes.set_title("Rows that lose most")
    if images is not None:
        axes.margins(x=0.25)
        for position, row in enumerate(rows.tolist()):
            image = images[row].detach().cpu().numpy()
            box = OffsetImage(image, zoom=18 / max(image.shape), cmap="gray_r")
            axes.add_artist(
                AnnotationBbox(box, (left[position], position), xybox=(12, 0), boxcoords="offset points", frameon=False)
            )
