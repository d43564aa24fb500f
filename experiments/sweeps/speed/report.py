"""The report of the sweep `speed`: step times of all ways, and what the library's steps are to keep to."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from experiments.reporting.document import Document, Figure
from experiments.reporting.figures import dots
from experiments.reporting.limits import Limit, table, verdict
from experiments.reporting.records import pick
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

_FIVE, _IMAGES, _SMALL = "five at once", "images", "small models"
_256, _FULL = ("A-VI k=64, batch 256", "F-VI, batch 256"), ("A-VI k=256, full batch", "F-VI, full batch")


class _Goal(NamedTuple):
    """A step of `way` is to take at most `most` times one of `other`: of several workloads the largest ratio counts."""

    what: str
    way: str
    other: str
    workloads: str | Sequence[str]
    most: float
    combined: Callable = max


_GOALS = [
    _Goal("a hand-written eager step, batch 256", "compiled", "hand", _256, 0.65),
    _Goal("a hand-written eager step, full batch", "compiled", "hand", _FULL, 0.80),
    _Goal("a hand-written step compiled whole, images", "compiled", "hand compiled", _IMAGES, 1.05),
    _Goal("a hand-written step compiled whole, small models", "compiled", "hand compiled", _SMALL, 1.05),
    _Goal("NumPyro's step, images", "compiled", "numpyro", _IMAGES, 0.78),
    _Goal("NumPyro's step, small models", "compiled", "numpyro", _SMALL, 0.78),
    _Goal("Pyro's SVI step, batch 256", "compiled", "svi", _256, 0.27),
    _Goal("Pyro's SVI step, full batch", "compiled", "svi", _FULL, 0.56),
    _Goal("NumPyro's step, with bfloat16 products, full batch", "bfloat16", "numpyro", _FULL[:1], 0.20),
    _Goal("its matrix products, full batch", "compiled", "products", _FULL, 1.20),
    _Goal(
        "five hand-written eager fits, small model, five at once", _FIVE, "hand", ("small, A-VI k=64, batch 100",), 0.38
    ),
    _Goal(
        "NumPyro's step, geometric mean over images", "compiled", "numpyro", _IMAGES, 0.70, statistics.geometric_mean
    ),
]
#: What is compared with itself, few rows, many rows, and at most what ratio.
_GROWTH = [
    ("F-VI of 10^6 rows / of 10^4 rows", "F-VI, batch 256, 10^4 rows", "F-VI, batch 256, 10^6 rows", 1.15),
    ("F-VI of 10^7 rows / of 10^4 rows, 16 latents",
     "F-VI, 16 latents, batch 256, 10^4 rows", "F-VI, 16 latents, batch 256, 10^7 rows", 1.3),
]  # fmt: skip
READING = """
Milliseconds: processor time of a step on one thread, the median over rounds that all ways take in turns; ratios are taken
within a round. Start: imports, data, compiling and three steps. Sooner: the step from which compiled is ahead, start included.

Compiled, eager, bfloat16: avi.fit with compile=True, compile=False, precision="bfloat16". Five at once: a step of each of
five by avi.fit_many. Hand: PyTorch written for this model, Adam fused; hand compiled: as one inductor graph. Svi: Pyro's SVI,
validation off. Numpyro: one lax.scan. Products: the matrix products of a step alone.

Images: a Bayesian decoder of 64-256-256-784, 10,000 images of noise. Small: 1,000 rows of 784, a decoder of 20-40-40-784.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    results = {str(pick(record, "settings", "workload")): record for record in records.values()}
    rounds, times, starts = (
        {name: pick(results[name], "result", field) for name in sorted(results)}
        for field in ("ms", "median_ms", "seconds_until_ready")
    )
    ways, limits = dict.fromkeys(way for ms in times.values() for way in ms), list(_limits(rounds, times))
    wide = [Column("workload", lambda name: name, "csv")]
    wide += [Column(way, lambda name, way=way: times[name].get(way), "csv") for way in ways]
    series = {way: [(ms.get(way, math.nan), math.nan, math.nan) for ms in times.values()] for way in ways}
    drawing = partial(dots, list(times), series, "milliseconds a step", log=True)
    tables = [table("Compiled step against", limits)] if limits else []
    return Document(
        "Speed",
        "A training step of the library against other ways of taking the same step, in turns, one thread each.",
        [verdict(limits)],
        [*tables, Table("", wide, times, file="summary")],
        [Figure("ms", "Milliseconds of a step", "Medians over rounds.", drawing)],
        [Document("From start to end", tables=[_every_way(times, starts)]), Document("How to read this", READING)],
    )


def _every_way(times: Mapping[str, Mapping], starts: Mapping[str, Mapping]) -> Table:
    """A line a workload and way: of a step, and from the start of the process."""

    def seconds(count: int, pair: tuple[str, str]) -> float | None:
        name, way = pair
        # A step of five is no step of one, and products are no training.
        return None if way in (_FIVE, "products") else starts[name][way] + count * times[name][way] / 1e3

    def sooner(pair: tuple[str, str]) -> int | str | None:
        ms, ready, way = times[pair[0]], starts[pair[0]], pair[1]
        if way in ("compiled", _FIVE, "products") or "compiled" not in ms:
            return None
        saved, later = ms[way] - ms["compiled"], ready["compiled"] - ready[way]
        return max(1, round(later / saved * 1e3)) if saved > 0 else "never" if later > 0 else 1

    def whole(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}"

    columns = [
        Column("workload", lambda pair: pair[0]),
        Column("way", lambda pair: pair[1]),
        Column("ms a step", lambda pair: times[pair[0]][pair[1]], best=min, text="{:.2f}".format),
        Column("s to start", lambda pair: starts[pair[0]][pair[1]], "page", text=whole),
        *(Column(f"to step {n:,}", partial(seconds, n), "page", min, whole) for n in (500, 5_000, 50_000)),
        Column("compiled sooner from", sooner),
    ]
    pairs = [(name, way) for name, ms in times.items() for way in ms]
    return Table("Seconds from the start", columns, pairs, group="workload")


def _limits(rounds: Mapping[str, Mapping], times: Mapping[str, Mapping]) -> Iterator[Limit]:
    """Every limit whose ways were timed."""
    small = {name for name in rounds if name.startswith(("tiny", "small"))}
    # Growing tables are neither images nor small models.
    groups = {_SMALL: small, _IMAGES: {name for name in rounds if "rows" not in name} - small}
    for goal in _GOALS:
        ways = (goal.way, goal.other)
        timed = [rounds[name] for name in groups.get(goal.workloads, goal.workloads) if name in rounds]
        timed = [[ms[way] for way in ways] for ms in timed if all(way in ms for way in ways)]
        ratios = [statistics.median(one / two for one, two in zip(*pair, strict=True)) for pair in timed]
        if ratios:
            yield Limit(goal.what, goal.combined(ratios) / (5 if goal.way == _FIVE else 1), goal.most)
    for what, few, many, most in _GROWTH:
        if all("compiled" in times.get(name, {}) for name in (few, many)):
            yield Limit(f"itself, {what}", times[many]["compiled"] / times[few]["compiled"], most)
