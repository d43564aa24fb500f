"""The report of the sweep `speed`: step times of all ways, and what the library's steps are to keep to."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from experiments.reporting.document import Document, Figure, Note
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
    _Goal("a hand-written eager step, batch 256", "compiled", "hand", _256, 0.55),
    _Goal("a hand-written eager step, full batch", "compiled", "hand", _FULL, 0.70),
    _Goal("a hand-written step compiled whole, images", "compiled", "hand compiled", _IMAGES, 1.05),
    _Goal("a hand-written step compiled whole, small models", "compiled", "hand compiled", _SMALL, 1.05),
    _Goal("NumPyro's step, images, 256 rows", "compiled", "numpyro", _256, 0.70),
    _Goal("NumPyro's step, images, full batch", "compiled", "numpyro", _FULL, 0.70),
    _Goal("NumPyro's step, small", "compiled", "numpyro", ("small, A-VI k=64, batch 100",), 0.75),
    _Goal("NumPyro's step, digits", "compiled", "numpyro", ("small, digits, A-VI k=16, batch 256",), 0.75),
    _Goal("NumPyro's step, tiny", "compiled", "numpyro", ("tiny, A-VI k=16, batch 20",), 1.0),
    _Goal("Pyro's SVI step, batch 256", "compiled", "svi", _256, 0.27),
    _Goal("Pyro's SVI step, full batch", "compiled", "svi", _FULL, 0.56),
    _Goal("NumPyro's step, with bfloat16 products, full batch", "bfloat16", "numpyro", _FULL, 0.25),
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
Milliseconds: {clock}, the median over rounds that all ways take in turns; ratios are taken
within a round. Start: imports, data, compiling and three steps{start}. Sooner: the step from which compiled is ahead, start
included. Memory: the most that was taken, {memory}.

Compiled, eager, bfloat16, tf32: avi.fit with compile=True, compile=False, and compiled with this precision of the matrix
products. Five at once: a step of each of five by avi.fit_many. Hand: PyTorch written for this model, Adam fused; hand
compiled: as one inductor graph; hand graph: captured as a CUDA graph. Svi: Pyro's SVI, validation off. Numpyro: one lax.scan.
Products: the matrix products of a step alone, in single precision, each by the faster library.

Images: a Bayesian decoder of 64-256-256-784, 10,000 images of noise. Small: 1,000 rows of 784, a decoder of 20-40-40-784.
"""
_OF_PROCESS = {"start": "", "memory": "with interpreter and libraries"}
_READ = {
    None: {"clock": "processor time of a step on one thread", **_OF_PROCESS},
    "threads": {"clock": "of a step by the clock", **_OF_PROCESS},
    "CUDA": {
        "clock": "of a step by the clock, from an idle device to an idle device",
        "start": ", of all ways at once",
        "memory": "of the device, without what CUDA itself takes",
    },
}


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key; those of CUDA and of each number of threads are parts where there are others.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    by_device: dict[tuple, dict] = {}
    for record in records.values():
        settings = record.get("settings", {})
        where = settings.get("device", "cpu"), settings.get("threads")
        by_device.setdefault(where, {})[str(pick(record, "settings", "workload"))] = record
    order = sorted(by_device, key=lambda where: (where[0], where[1] or 0))
    drawn = [_of_device(by_device[where], *where) for where in order]
    return drawn[0] if len(drawn) == 1 else Document("Speed", parts=drawn)


def _of_device(results: Mapping[str, Mapping], device: str, threads: int | None) -> Document:
    """The report of records of one device, or of one number of threads by the clock, by workload."""
    kind = "CUDA" if device == "cuda" else "threads" if threads else None
    where = {"CUDA": " on CUDA", "threads": f" by the clock, threads: {threads}", None: ""}[kind]
    rounds, times = (
        {name: pick(results[name], "result", told) for name in sorted(results)} for told in ("ms", "median_ms")
    )
    ways, limits = (
        dict.fromkeys(way for ms in times.values() for way in ms),
        [] if kind else list(_limits(rounds, times)),
    )
    wide = [
        Column("workload", lambda name: name, "csv"),
        Column("device", lambda name: device if threads is None else f"{device}, threads: {threads}", "csv"),
    ]
    wide += [Column(way, lambda name, way=way: times[name].get(way), "csv") for way in ways]
    series = {way: [(ms.get(way, math.nan), math.nan, math.nan) for ms in times.values()] for way in ways}
    drawing = partial(dots, list(times), series, "milliseconds a step", log=True)
    tables = [table("Compiled step against", limits)] if limits else []
    return Document(
        f"Speed{where}",
        f"A training step of the library against other ways of taking the same step, in turns, threads: {threads or 1}.",
        # What is to be kept to is of one thread of a CPU.
        [*([] if kind else [verdict(limits)]), *_told(results)],
        [*tables, _ratios(rounds), Table("", wide, times, file="summary")],
        [Figure("ms", "Milliseconds of a step", "Medians over rounds.", drawing)],
        [
            Document("From start to end", tables=[_every_way(times, results)]),
            Document("How to read this", READING.format(**_READ[kind])),
        ],
    )


def _told(results: Mapping[str, Mapping]) -> Iterator[Note]:
    """What was left out, and what the library has warned of."""
    for field, title in (("left_out", "Left out"), ("warnings", "Warnings")):
        said: dict[str, list[str]] = {}
        for name, record in sorted(results.items()):
            # Earlier records have no such field.
            for way, why in record["result"].get(field, {}).items():
                reason = f"{way}: {why if isinstance(why, str) else ' '.join(why)}"
                said.setdefault(reason.removesuffix("."), []).append(name)
        if said:
            yield Note(
                "warning", "; ".join(f"{reason} ({', '.join(names)})" for reason, names in said.items()) + ".", title
            )


def _ratios(rounds: Mapping[str, Mapping]) -> Table:
    """A line a workload: a compiled step over one of each other way, the median over rounds."""
    shown = {name: ms for name, ms in rounds.items() if len(ms) > 1 and "compiled" in ms}
    ways = dict.fromkeys(way for ms in shown.values() for way in ms if way != "compiled")

    def ratio(name: str, way: str) -> float | None:
        return _ratio(shown[name], "compiled", way) if way in shown[name] else None

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    columns = [Column(f"of {way}", partial(ratio, way=way), text=text) for way in ways]
    return Table("Compiled step as a share", [Column("workload", lambda name: name), *columns], shown)


def _ratio(ms: Mapping[str, Sequence[float]], one: str, two: str) -> float:
    return statistics.median(a / b for a, b in zip(ms[one], ms[two], strict=True))


def _every_way(times: Mapping[str, Mapping], results: Mapping[str, Mapping]) -> Table:
    """A line a workload and way: of a step, and from the start of the process."""
    starts = {name: pick(results[name], "result", "seconds_until_ready") for name in times}

    def rows(pair: tuple[str, str]) -> float | None:
        name, way = pair
        size = results[name]["settings"].get("batch_size")
        if way == "products" or size is None:
            return None
        return (5 if way == _FIVE else 1) * size / times[name][way] * 1e3

    def memory(pair: tuple[str, str]) -> float | None:
        taken = results[pair[0]]["result"].get("peak_memory_bytes", {}).get(pair[1])
        return None if taken is None else taken / 1e9

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
        Column("rows a second", rows, text=whole),
        Column("GB", memory, "page", text=lambda value: "" if value is None else f"{value:.2f}"),
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
        ratios = [_ratio(ms, *ways) for ms in timed if all(way in ms for way in ways)]
        if ratios:
            yield Limit(goal.what, goal.combined(ratios) / (5 if goal.way == _FIVE else 1), goal.most)
    for what, few, many, most in _GROWTH:
        if all("compiled" in times.get(name, {}) for name in (few, many)):
            yield Limit(f"itself, {what}", times[many]["compiled"] / times[few]["compiled"], most)
