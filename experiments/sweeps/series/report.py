"""What the sweep `series` answers."""

from collections.abc import Sequence

import numpy as np

from experiments.comparison.report import Line
from experiments.reporting.document import Note

__all__ = ["LEAD", "READING", "claims"]

#: The draws of an estimate to whose standard error a gap is compared.
DRAWS = 1_000
LEAD = (
    "z_n ~ N(x_{n-1}, 1), x_n ~ N(0.75 (z_n + theta), 1). The best factor of z_n is linear in x_{n-1} and x_n: an encoder of "
    "x_n alone leaves a gap, one of both rows need not."
)
READING = """
Margossian and Blei (2024), losses without constants: F-VI 553.077, constant 2933.55, x_n alone 892 to 885 by width, both rows
553.05 to 553.08; median steps to 1 %: F-VI 17595, both rows 9085 to 7145, all by Adam at 0.001. The data are simulated as
there. Here theta has the prior N(0, 100^2) in place of the flat one, networks have leaky ReLUs, which cannot all die, and read
standardized values; a window also marks where the series begins.

A bound estimated with 1,000 draws has a standard error of the log weights' standard deviation by the root of 1,000, which at
the best factors is known in closed form. The gaps are exact and compared to it.

Of x_n alone a line is the best function for data of the model, where x_{n-1} and x_n are normal together. On these rows a
network may lose less, as far as it follows their noise.
"""


def claims(lines: Sequence[Line]) -> list[Note]:
    """Who converged, whether windows attain the best bound, and whether x_n alone leaves its gap."""
    fair = [line for line in lines if line.protocol == "fair"]
    if not fair:
        return []
    error = fair[0].spread / DRAWS**0.5
    return [*_converged(fair, error), *_windows(fair, error), *_own_rows(fair)]


def _converged(fair: Sequence[Line], error: float) -> list[Note]:
    """Where the optimum of an arm is known, whether it is reached."""
    off = {line.arm: abs(line.gaps - line.predicted) for line in fair if line.predicted is not None}
    if not off:
        return []
    # A difference that is nan is not within anything.
    there = [arm for arm, of in off.items() if (of < error).all()]
    text = (
        f"Within {error:.2g} nats for all rows of the closed form in every seed, the standard error of a bound by {DRAWS:,} "
        f"draws: {'; '.join(there) or 'none'}."
    )
    if missed := [arm for arm in off if arm not in there]:
        text += f" Not converged: {'; '.join(missed)}."
    return [Note("warning" if missed else "answer", text)]


def _windows(fair: Sequence[Line], error: float) -> list[Note]:
    windows = [line for line in fair if line.arm.startswith("window")]
    if not windows:
        return []
    gaps = np.concatenate([line.gaps for line in windows])
    within = int((gaps < error).sum())
    text = (
        f"(x_n-1, x_n): {within} of {len(gaps)} trainings end within the standard error of {DRAWS:,} draws, {error:.2g} "
        f"nats, of the best bound; the largest gap is {gaps.max():.2g} nats for all rows, the median {np.median(gaps):.2g}."
    )
    return [Note("answer" if within == len(gaps) else "warning", text)]


def _own_rows(fair: Sequence[Line]) -> list[Note]:
    """What encoders of x_n alone lose, linear ones and networks."""
    notes, own = [], [line for line in fair if line.arm.startswith("x_n, ")]
    linear = next((line for line in own if line.predicted is not None), None)
    if linear is None:
        return notes
    loss, off = linear.predicted, max(abs(linear.gaps - linear.predicted))
    text = f"x_n alone, linear: loses {loss:.3f} nats by the closed form; measured within {off:.2g} of it."
    notes.append(Note("answer" if off < 1 else "warning", text))
    for line in own:
        if line is not linear:
            text = (
                f"{line.arm}: networks of x_n alone lose {line.gaps.min():.1f} to {line.gaps.max():.1f} nats, of the "
                f"{loss:.1f} that a line loses."
            )
            notes.append(Note("answer" if line.gaps.min() > 0.9 * loss else "warning", text))
    return notes
