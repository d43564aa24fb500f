"""What the sweep `linear` answers."""

from collections.abc import Sequence

from experiments.comparison.report import Line
from experiments.reporting.document import Note

__all__ = ["LEAD", "READING", "claims"]

LEAD = (
    "z_n ~ N(0, 1), x_n ~ N(theta + 1.155 z_n, 2.43^2), a flat prior on theta. The best factors are linear in their row: "
    "an encoder that is a polynomial of degree 1 can give them, one of degree 0 cannot."
)
READING = """
Margossian and Blei (2024), whose losses for 10,000 rows lack constants: F-VI 6090.30, degree 0 7232.36, degree 1 6087.993,
degree 2 6087.996; median steps to 1 %: F-VI 2135 (Adam at 0.001), degree 1 365, degree 2 700 (at 0.01). F-VI had not converged.
The logarithm of the scale is a polynomial here too; the best is constant.
"""


def claims(lines: Sequence[Line]) -> list[Note]:
    """Whether degrees 1 and 2 close the gap and degree 0 loses the closed form."""
    fair = {line.arm: line for line in lines if line.protocol == "fair"}
    notes = []
    for degree in ("degree 1", "degree 2"):
        if (line := fair.get(degree)) is not None:
            most = max(line.gaps) / line.rows
            text = f"{degree.capitalize()}: the largest gap of {len(line.gaps)} seeds is {most:.2g} nats a row"
            text += " (to be below 0.001)."
            notes.append(Note("answer" if most < 1e-3 else "warning", text))
    if (line := fair.get("degree 0")) is not None and line.predicted is not None:
        off = max(abs(line.gaps - line.predicted)) / line.rows
        loss = line.predicted / line.rows
        text = f"Degree 0 loses {loss:.5f} nats a row by the closed form; measured within {off:.2g} of it."
        notes.append(Note("answer" if off < 1e-3 else "warning", text))
    return notes
