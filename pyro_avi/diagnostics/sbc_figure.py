"""The figure of a calibration: ranks, their distribution functions, coverage."""

import numpy as np
import torch

from pyro_avi.display.figures import new_figure
from pyro_avi.errors import check_count

__all__ = ["plot_calibration"]

_BAND, _LINE, _OTHERS = "#cccccc", "#4477aa", "#99bbdd"
_PROB, _BARS = 0.95, 20


def plot_calibration(calibration, *, most: int = 4):
    """Draw a calibration.

    Args:
        calibration: a :class:`~pyro_avi.Calibration`.
        most: of how many quantities ranks are drawn, those with the smallest p-values first.

    Returns:
        A :class:`matplotlib.figure.Figure`.

    Raises:
        ValueError: if ``most`` is not positive.
    """
    check_count("most", most)
    shown = calibration.p_values.argsort(stable=True)[:most].tolist()
    figure = new_figure(figsize=(2.6 * len(shown) + 4.6, 5), layout="constrained")
    above, below = ([f"{part} {i}" for i in shown] for part in ("histogram", "distribution"))
    ratios = {"width_ratios": [1.0] * len(shown) + [1.7]}
    axes = figure.subplot_mosaic([[*above, "coverage"], [*below, "coverage"]], gridspec_kw=ratios)
    for column, i in enumerate(shown):
        _histogram(axes[f"histogram {i}"], calibration, i, first=column == 0)
        _distribution(axes[f"distribution {i}"], calibration, i, first=column == 0)
    _coverage(axes["coverage"], calibration, shown)
    return figure


def _histogram(axes, calibration, i: int, *, first: bool) -> None:
    from scipy.stats import binom

    rows, count = len(calibration.ranks), calibration.num_samples + 1
    edges = np.linspace(0, count, min(count, _BARS) + 1).round().astype(int)
    expected = rows * np.diff(edges) / count
    heights = np.histogram(calibration.ranks[:, i].numpy(), edges - 0.5)[0] / expected
    ends = [binom.ppf(tail, rows, np.diff(edges) / count) / expected for tail in ((1 - _PROB) / 2, (1 + _PROB) / 2)]
    places = edges / count
    axes.bar(places[:-1], heights, np.diff(places), align="edge", color=_LINE, edgecolor="white", linewidth=0.5)
    axes.stairs(ends[1], places, baseline=ends[0], fill=True, color=_BAND, alpha=0.6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_title(f"{calibration.names[i]}, p = {calibration.p_values[i]:.2g}", fontsize="medium")
    axes.set_xlabel("rank / (S + 1)")
    if first:
        axes.set_ylabel("rows / expected")


def _distribution(axes, calibration, i: int, *, first: bool) -> None:
    band = calibration.uniform
    shares = np.concatenate([[0], band.shares.numpy(), [1]])
    lower, upper = (np.concatenate([[0], end.numpy(), [1]]) - shares for end in band.band(_PROB))
    line = np.concatenate([[0], band.distribution(calibration.ranks[:, [i]])[:, 0].numpy(), [1]]) - shares
    axes.fill_between(shares, lower, upper, color=_BAND, alpha=0.6, linewidth=0)
    axes.plot(shares, line, color=_LINE)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("rank / (S + 1)")
    if first:
        axes.set_ylabel("share below, minus uniform")


def _coverage(axes, calibration, shown: list[int]) -> None:
    least = 2 / (calibration.num_samples + 1)
    coverage = calibration.coverage(torch.linspace(least, 1 - least, 50, dtype=torch.double).tolist())
    nominal = coverage.nominal.numpy()
    error = 2 * np.sqrt(nominal * (1 - nominal) / len(calibration.ranks))
    axes.fill_between(nominal, nominal - error, nominal + error, color=_BAND, alpha=0.6, linewidth=0)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    for i in range(len(calibration.names)):
        if i not in shown:
            axes.plot(nominal, coverage.empirical[:, i].numpy(), color=_OTHERS, linewidth=0.6)
    for place, i in enumerate(shown):
        style = ["-", "--", "-.", ":"][place % 4]
        axes.plot(nominal, coverage.empirical[:, i].numpy(), style, label=calibration.names[i])
    axes.set_xlabel("probability of the central interval")
    axes.set_ylabel("share of rows inside")
    axes.set_title("Coverage, with two standard errors", fontsize="medium")
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize="small", loc="upper left")
