"""Ratios that are to keep to a limit, and whether they do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from experiments.reporting.document import Figure, Note
from experiments.reporting.figures import dots
from experiments.reporting.tables import Column, Table


class Limit(NamedTuple):
    """A measured ratio with its quartiles, and the most that it may be."""

    what: str
    ratio: float
    most: float
    low: float = math.nan
    high: float = math.nan


def verdict(limits: Sequence[Limit]) -> Note:
    """How many of the ratios lie above their limits, and which the most.

    >>> verdict([Limit("a", 1.0, 1.1), Limit("b", 1.2, 1.1)]).text
    '1 of 2 ratios are above their limits, most of all b: 1.20, at most 1.10.'
    """
    if not limits:
        return Note("warning", "None of the ratios that are to keep to a limit was measured.")
    labels, most = [each.what for each in limits], [(each.most, math.nan, math.nan) for each in limits]
    series = {"ratio": [(each.ratio, each.low, each.high) for each in limits], "at most": most}
    caption = "A line: from quartile to quartile." if any(math.isfinite(each.low) for each in limits) else ""
    figure = Figure("limits", "Ratios and limits", caption, partial(dots, labels, series, "ratio"))
    above = [each for each in limits if each.ratio > each.most]
    text = f"{len(above)} of {len(limits)} ratios are above their limits"
    if above:
        worst = max(above, key=lambda each: each.ratio / each.most)
        text += f", most of all {worst.what}: {worst.ratio:.2f}, at most {worst.most:.2f}"
    return Note("warning" if above else "answer", f"{text}.", figure=figure)


def table(title: str, limits: Sequence[Limit]) -> Table:
    """A line a ratio."""
    columns = [Column("against", "what"), Column("ratio", "ratio", text="{:.2f}".format)]
    return Table(title, [*columns, Column("at most", "most", text="{:.2f}".format)], limits)
