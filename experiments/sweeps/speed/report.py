"""The report of the sweep `speed`: step times of all ways, and what the library's steps are to keep to."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from experiments.reporting.document import Document, pick, reading
from experiments.reporting.limits import Limit, verdict
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

_256, _FULL = ("A-VI k=64, batch 256", "F-VI, batch 256"), ("A-VI k=256, full batch", "F-VI, full batch")
_IMAGES, _SMALL = "images", "small models"
_FIVE = "five at once"
#: What a way is compared with, both ways, the workloads, and at most what ratio; of several workloads the largest ratio counts.
_LIMITS = [
    ("a hand-written eager step, batch 256", "compiled", "hand", _256, 0.65),
    ("a hand-written eager step, full batch", "compiled", "hand", _FULL, 0.80),
    ("a hand-written step compiled whole, images", "compiled", "hand compiled", _IMAGES, 1.05),
    ("a hand-written step compiled whole, small models", "compiled", "hand compiled", _SMALL, 1.05),
    ("NumPyro's step, images", "compiled", "numpyro", _IMAGES, 0.78),
    ("NumPyro's step, small models", "compiled", "numpyro", _SMALL, 0.78),
    ("Pyro's SVI step, batch 256", "compiled", "svi", _256, 0.27),
    ("Pyro's SVI step, full batch", "compiled", "svi", _FULL, 0.56),
    ("NumPyro's step, with bfloat16 products, full batch", "bfloat16", "numpyro", _FULL[:1], 0.20),
    ("its matrix products, full batch", "compiled", "products", _FULL, 1.20),
]
#: The geometric mean over images.
_MEAN = ("NumPyro's step, geometric mean over images", "compiled", "numpyro", _IMAGES, 0.70)
#: Five at once against five fits one after another.
_SEVERAL = (
    "five hand-written eager fits, small model, five at once",
    _FIVE,
    "hand",
    ("small, A-VI k=64, batch 100",),
    0.38,
)
#: What is compared with itself, few rows, many rows, and at most what ratio.
_GROWTH = [
    ("F-VI of 10^6 rows / of 10^4 rows", "F-VI, batch 256, 10^4 rows", "F-VI, batch 256, 10^6 rows", 1.15),
    ("F-VI of 10^7 rows / of 10^4 rows, 16 latents",
     "F-VI, 16 latents, batch 256, 10^4 rows", "F-VI, 16 latents, batch 256, 10^7 rows", 1.3),
]  # fmt: skip
#: How far fits are followed from their start.
_STEPS = (500, 5_000, 50_000)
READING = """
Every way runs in a process of its own on one thread. Rounds of steps of all of them follow one another; ratios are taken
within a round, and the median over rounds is shown, of several workloads the largest. Steps: processor time. Start:
imports, data, compiling and three steps. End to end: both together, and the step from which on compiled is sooner; losses
of all ways agree but for noise, so it is also the time to a level of the ELBO.

Compiled, eager, bfloat16: avi.fit with compile=True, compile=False, and precision="bfloat16". Five at once: one step of
each of five by avi.fit_many. Hand: PyTorch written for this model, Adam fused; compiled: the whole step as one inductor
graph. Svi: Pyro's SVI with Trace_ELBO and our guide, validation off. Numpyro: steps in one lax.scan. Products: the matrix
products of a step alone.

Images: a Bayesian decoder of 64-256-256-784 and 10,000 images of uniform noise, encoders of k units. Tiny: 200 rows of 4
numbers, a decoder of 2-4-4. Small: 1,000 rows of 784, a decoder of 20-40-40-784. Digits: 1,797 rows of 64, a decoder of
8-64-64-64. Growing tables: the decoder of the images, rows all over the table in every batch.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    results = {str(pick(record, "settings", "workload")): record for record in records.values()}
    times, rounds, starts = (
        {name: pick(results[name], "result", field) for name in sorted(results)}
        for field in ("median_ms", "ms", "seconds_until_ready")
    )
    limits = list(_limits(rounds, times))
    columns = [
        Column("against", lambda limit: limit.what),
        Column("ratio", lambda limit: limit.ratio, text="{:.2f}".format),
        Column("at most", lambda limit: limit.most, text="{:.2f}".format),
    ]
    return Document(
        title="Speed",
        lead="A training step of the library against other ways of taking the same step, in turns, one thread each.",
        notes=[verdict(limits)],
        tables=[Table("Compiled step against", columns, limits)],
        parts=[
            Document(
                "Milliseconds of a step",
                tables=[_by_way("ms", times, "{:.2f}".format, file="summary")],
                name="steps",
            ),
            Document("Seconds from start to first round", tables=[_by_way("s", starts, "{:.0f}".format)], name="start"),
            Document("End to end", tables=[_end_to_end(times, starts)], name="end-to-end"),
            reading(READING),
        ],
    )


def _by_way(unit: str, found: Mapping[str, Mapping], text: Callable, file: str = "") -> Table:
    """A line a workload and a column a way; a way that was not taken has no entry."""
    ways = dict.fromkeys(way for numbers in found.values() for way in numbers)
    columns = [Column("workload", lambda name: name)]
    columns += [
        Column(way, lambda name, way=way: found[name].get(way), text=lambda value: "" if value is None else text(value))
        for way in ways
    ]
    return Table(unit, columns, found, file=file)


def _end_to_end(times: Mapping[str, Mapping], starts: Mapping[str, Mapping]) -> Table:
    # A step of five is no step of one, and products are no training.
    pairs = [(name, way) for name, ms in times.items() for way in ms if way not in (_FIVE, "products")]

    def seconds(count: int, pair: tuple[str, str]) -> float:
        name, way = pair
        return starts[name][way] + count * times[name][way] / 1e3

    columns = [Column("workload", lambda pair: pair[0]), Column("way", lambda pair: pair[1])]
    for count in _STEPS:
        columns.append(Column(f"s to step {count:,}", partial(seconds, count), best=min, text="{:.0f}".format))
    columns.append(Column("compiled sooner from", lambda pair: _pays(times[pair[0]], starts[pair[0]], pair[1])))
    return Table("Seconds from start", columns, pairs, group="workload")


def _pays(ms: Mapping, ready: Mapping, way: str) -> int | str | None:
    """From which step on the library's compiled steps are ahead, what came before the first step included."""
    if way == "compiled" or "compiled" not in ms:
        return None
    saved, later = ms[way] - ms["compiled"], ready["compiled"] - ready[way]
    if saved <= 0:
        return "never" if later > 0 else 1
    return max(1, round(later / saved * 1e3))


def _limits(rounds: Mapping[str, Mapping], times: Mapping[str, Mapping]) -> Iterator[Limit]:
    """Every limit whose ways were timed."""
    small = {name for name in rounds if name.startswith(("tiny", "small"))}
    # Growing tables are neither images nor small models.
    groups = {_SMALL: small, _IMAGES: {name for name in rounds if "rows" not in name} - small}
    for what, way, other, workloads, most in (*_LIMITS, _SEVERAL, _MEAN):
        ratios = []
        for name in groups.get(workloads, workloads):
            ms = rounds.get(name, {})
            if way in ms and other in ms:
                ratios.append(statistics.median(one / two for one, two in zip(ms[way], ms[other], strict=True)))
        if what == _MEAN[0]:
            if len(ratios) > 1:
                yield Limit(what, statistics.geometric_mean(ratios), most)
        elif ratios:
            yield Limit(what, max(ratios) / (5 if way == _FIVE else 1), most)
    for what, few, many, most in _GROWTH:
        if all("compiled" in times.get(name, {}) for name in (few, many)):
            yield Limit(f"itself, {what}", times[many]["compiled"] / times[few]["compiled"], most)
