"""The figure of trainings: the loss by step and by second."""

from collections.abc import Mapping

import numpy as np

from pyro_avi.display.figures import new_figure

__all__ = ["plot_losses"]

_COLORS = ["#4477aa", "#ee6677", "#117733", "#ddaa33", "#332288", "#44aa99"]
# How many losses are drawn as dots, and of how many medians a line is made.
_DOTS, _MEDIANS = 2000, 60
# Losses of this first share of the steps are left out of the axis if they lie further apart than this many times the range
# of all later ones.
_FIRST, _FAR = 0.1, 3.0


def plot_losses(fits: Mapping):
    """Draw losses by step and by second.

    The axis shows all losses where those of the first steps are not far from the rest. Otherwise it shows the medians after
    the first tenth of the steps, and most of the noise around them.

    Args:
        fits: :class:`~pyro_avi.Fit` by name.

    Returns:
        A :class:`matplotlib.figure.Figure`.

    Raises:
        ValueError: if a training has taken no step yet.
    """
    for name, fit in fits.items():
        if not fit.steps:
            raise ValueError(f"Expected trainings with at least one step, got none of {name!r}.")
    figure = new_figure(figsize=(10, 4), layout="constrained")
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    ranges = []
    for color, (name, fit) in zip(_COLORS * len(fits), fits.items(), strict=False):
        losses = fit.losses.numpy()
        steps = np.arange(1, len(losses) + 1)
        window = max(1, len(losses) // _MEDIANS)
        medians = _medians(losses, window)
        for axes, places in ((by_step, steps), (by_second, fit.times.numpy())):
            _draw(axes, places, losses, medians, window, color, name)
        ranges.append(_range(losses, medians))
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    margin = 0.05 * (high - low) or 1.0
    by_step.set_ylim(low - margin, high + margin)
    by_step.set_ylabel("loss, nats")
    by_step.ticklabel_format(axis="y", useOffset=False)
    _label(by_step, fits, "step")
    _label(by_second, fits, "second")
    return figure


def _medians(losses: np.ndarray, window: int) -> np.ndarray:
    """``[M]`` the medians of successive groups of steps, ``window`` or a few more in each."""
    parts = np.array_split(losses, max(1, len(losses) // window))
    return np.array([np.median(part) for part in parts])


def _draw(axes, places, losses, medians, window: int, color: str, name: str) -> None:
    some = slice(None, None, -(-len(losses) // _DOTS))
    if window == 1:
        axes.plot(places, losses, "." * (len(losses) == 1) + "-", color=color, label=name)
        return
    axes.plot(places[some], losses[some], ".", color=color, markersize=2, alpha=0.35, linewidth=0)
    middles = [part.mean() for part in np.array_split(places, len(medians))]
    axes.plot(middles, medians, color=color, label=name)


def _range(losses: np.ndarray, medians: np.ndarray) -> tuple[float, float]:
    """The lowest and the highest loss that the axis shows."""
    late = losses[int(_FIRST * len(losses)) :]
    late, medians = late[np.isfinite(late)], medians[int(np.ceil(_FIRST * len(medians))) :]
    medians = medians[np.isfinite(medians)]
    if not len(late):
        return 0.0, 1.0
    # Noise with a few very large values would hide the rest: the axis shows most of it.
    low, high = np.quantile(late, [0.01, 0.95])
    low, high = min([low, *medians]), max([high, *medians])
    every = losses[np.isfinite(losses)]
    is_near = np.ptp(every) <= _FAR * (high - low)
    return (every.min(), every.max()) if is_near else (low, high)


def _label(axes, fits: Mapping, by: str) -> None:
    low, high = axes.get_ylim()
    axes.set_title(f"Loss by {by}")
    axes.set_xlabel(f"{by}s")
    if by == "second":
        compiling = [f"{fit.compile_seconds:.3g}" for fit in fits.values() if fit.compile_seconds]
        if compiling:
            axes.set_xlabel(f"seconds ({', '.join(compiling)} of them compiling)")
        return
    if any((fit.losses > high).any() or (fit.losses < low).any() for fit in fits.values()):
        first = ", ".join(f"{fit.losses[0].item():.3g}" for fit in fits.values())
        axes.text(0.98, 0.97, f"first loss {first}", ha="right", va="top", transform=axes.transAxes, fontsize="small")
    if len(fits) > 1:
        axes.legend(frameon=False, fontsize="small", loc="upper center")
