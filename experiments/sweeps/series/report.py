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
"""


def claims(lines: Sequence[Line]) -> list[Note]:
    """Whether windows attain the best bound, and x_n alone leaves its gap."""
    notes, fair = [], [line for line in lines if line.protocol == "fair"]
    windows = [line for line in fair if line.arm.startswith("window")]
    if windows:
        error = windows[0].spread / DRAWS**0.5
        gaps = np.concatenate([line.gaps for line in windows])
        within = int((gaps < error).sum())
        text = (
            f"(x_n-1, x_n): {within} of {len(gaps)} trainings end within the standard error of {DRAWS:,} draws, {error:.2g} "
            f"nats, of the best bound; the largest gap is {gaps.max():.2g} nats for all rows, the median {np.median(gaps):.2g}."
        )
        notes.append(Note("answer" if within == len(gaps) else "warning", text))
    for line in fair:
        if line.arm.startswith("x_n, linear") and line.predicted is not None:
            off = max(abs(line.gaps - line.predicted))
            text = f"x_n alone, linear: loses {line.predicted:.3f} nats by the closed form; measured within {off:.2g} of it."
            notes.append(Note("answer" if off < 1 else "warning", text))
    return notes
