"""Ratios that are to keep to a limit, and what is above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments.reporting.document import Note, counted, listed


class Limit(NamedTuple):
    """A measured ratio and the most that it may be."""

    what: str
    ratio: float
    most: float


def verdict(limits: Sequence[Limit]) -> Note:
    """Which of the ratios lie above their limits.

    >>> verdict([Limit("a", 1.0, 1.1), Limit("b", 1.2, 1.1)]).text
    'Above the limit, 1 of 2 ratios: b, 1.20 (1.10).'
    """
    above = [f"{what}, {ratio:.2f} ({most:.2f})" for what, ratio, most in limits if ratio > most]
    if not limits:
        return Note("warning", "None of the ratios that are to keep to a limit was measured.")
    if not above:
        return Note("answer", f"All within the limits: {counted(len(limits), 'ratio')}.")
    return Note("warning", f"Above the limit, {len(above)} of {counted(len(limits), 'ratio')}: {listed(above)}.")
