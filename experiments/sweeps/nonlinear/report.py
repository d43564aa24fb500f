"""What the sweep `nonlinear` answers."""

from collections.abc import Sequence

import numpy as np

from experiments.comparison.report import Line
from experiments.reporting.document import Note

__all__ = ["LEAD", "READING", "claims"]

ONE, SEVERAL = "F-VI", "F-VI, several starts"
LEAD = (
    "z_n ~ N(0, 1), x_n ~ N(theta + z_n sin z_n + z_n, exp(cos z_n)^2), a flat prior on theta. Posteriors have several modes, "
    "and so have the bounds of their rows: a table ends where it starts from leads, an encoder has to follow the best ones."
)
READING = """
Margossian and Blei (2024), best losses of ten seeds for 10,000 rows: F-VI 32398.9, constant 36700.1, x_n by width (1, 2, 4, 8,
16, 24, 32) 35638.7, 32593.3, 32391.9, 32387.0, 32386.0, 32385.6, 32385.4, some runs nan or diverged; median steps to 1 %, Adam
at 0.01: F-VI 1280, width 4 1045, 8 1060, 16 555, 24 520, 32 250. Their log joint leaves out -cos z_n, which is no constant: the
losses compare to none here. An encoder's below F-VI's says that F-VI was not at its optimum.

The data are simulated as there, with latents of standard deviation 5. All bounds are by quadrature. The best is that of the
best modes of all rows, at many theta, and a climb from there. F-VI starts all rows at z = 0. By several starts each row begins
where its own bound at theta = 0 is the largest of 388 (97 means, 4 scales); that search is no part of the seconds. Networks
have two layers of leaky ReLUs, which cannot all die, and read standardized values.
"""


def claims(lines: Sequence[Line]) -> list[Note]:
    """The best bound; whether a training diverged; whether an encoder ends above a table, of several starts and of one."""
    first = lines[0]
    notes = [
        Note("answer", f"The best bound of normal factors, by quadrature, is {first.best:,.3f} nats, the evidence "
             f"{first.evidence:,.3f}: {(first.evidence - first.best) / first.rows:.4f} nats a row between them."),
        _diverged(lines),
    ]  # fmt: skip
    for protocol in ("published", "fair"):
        of = {line.arm: line for line in lines if line.protocol == protocol}
        encoders = {arm: _ends(line).max() for arm, line in of.items() if arm.startswith("x_n")}
        if not encoders:
            continue
        highest = max(encoders, key=lambda arm: encoders[arm])
        if (line := of.get(SEVERAL)) is not None:
            lead = _ends(line).min() - encoders[highest]
            text = (
                f"{protocol.capitalize()}: F-VI by several starts ends at worst {abs(lead):.3g} nats for all rows "
                f"{'above' if lead >= 0 else 'below'} the best training of any encoder ({highest})."
            )
            notes.append(Note("answer" if lead >= 0 else "warning", text))
        if (line := of.get(ONE)) is not None:
            above = [arm for arm, end in encoders.items() if end > _ends(line).max()]
            if above:
                names = "; ".join(above)
                text = f"{protocol.capitalize()}: F-VI of one start is not at its optimum: below the best training of {names}."
                notes.append(Note("answer", text))
    return notes


def _ends(line: Line) -> np.ndarray:
    """By seed the last bound, of one that diverged minus infinity."""
    return np.nan_to_num(line.bounds[:, -1], nan=-np.inf)


def _diverged(lines: Sequence[Line]) -> Note:
    """How many trainings, each guide at its best rate, have no bound at the end, or one below that at their first look."""
    count = sum(len(line.bounds) for line in lines)
    bad = [(line, int((~(line.bounds[:, -1] >= line.bounds[:, 0])).sum())) for line in lines]
    where = ", ".join(f"{line.arm} at {line.rate:g}" for line, number in bad if number)
    total = sum(number for _, number in bad)
    text = f"{total} of {count} trainings in the table diverged or ended below where they began"
    text += f": {where}." if where else "."
    return Note("warning" if total else "answer", text)
