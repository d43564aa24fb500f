"""The report of the sweep `speed`: step times of all ways, and what the library's steps are to keep to."""

import statistics
from collections.abc import Mapping

from experiments.reporting.document import Document, Finding, ReportError, Section, Table, made_by

__all__ = ["document"]

_IMAGES, _SMALL = "images", "small models"
# What is compared, by which way, over which workloads, and at most what ratio; of several workloads the largest ratio counts.
_LIMITS = [
    ("a hand-written eager step, batch 256", "compiled", "hand", ("A-VI k=64, batch 256", "F-VI, batch 256"), 0.65),
    ("a hand-written eager step, full batch", "compiled", "hand", ("A-VI k=256, full batch", "F-VI, full batch"), 0.80),
    ("a hand-written step compiled whole, images", "compiled", "hand compiled", _IMAGES, 1.05),
    ("a hand-written step compiled whole, small models", "compiled", "hand compiled", _SMALL, 1.05),
    ("NumPyro's step, images", "compiled", "numpyro", _IMAGES, 0.78),
    ("NumPyro's step, small models", "compiled", "numpyro", _SMALL, 0.78),
    ("Pyro's SVI step, batch 256", "compiled", "svi", ("A-VI k=64, batch 256", "F-VI, batch 256"), 0.27),
    ("Pyro's SVI step, full batch", "compiled", "svi", ("A-VI k=256, full batch", "F-VI, full batch"), 0.56),
    ("with bfloat16 products / NumPyro, full batch", "bfloat16", "numpyro", ("A-VI k=256, full batch",), 0.20),
    ("its matrix products, full batch", "compiled", "products", ("A-VI k=256, full batch", "F-VI, full batch"), 1.20),
]
# Five at once are compared with five fits one after another.
_SEVERAL = ("five hand-written eager fits, small model, five at once", "small, A-VI k=64, batch 100", 0.38)
# What is compared with itself, few rows, many rows, and at most what ratio.
_GROWTH = [
    ("F-VI of 10^6 rows / of 10^4 rows", "F-VI, batch 256, 10^4 rows", "F-VI, batch 256, 10^6 rows", 1.15),
    (
        "F-VI of 10^7 rows / of 10^4 rows, 16 latents",
        "F-VI, 16 latents, batch 256, 10^4 rows",
        "F-VI, 16 latents, batch 256, 10^7 rows",
        1.3,
    ),
]


# How far fits are followed from their start.
_STEPS = (500, 5_000, 50_000)


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    try:
        results = {record["settings"]["workload"]: record["result"] for record in records.values()}
        lines = [_line(name, result) for name, result in sorted(results.items())]
        made = made_by(records)
    except KeyError as error:
        raise ReportError(f"Expected records of the sweep speed, got one without {error}.") from error
    limits = [limit for limit in (_limit(results, *each) for each in _LIMITS) if limit is not None]
    limits += [limit for limit in (_growth(results, *each) for each in _GROWTH) if limit is not None]
    several = _five_at_once(results, *_SEVERAL)
    limits += [] if several is None else [several]
    mean = _mean_of_numpyro(results)
    limits += [] if mean is None else [mean]
    ways = [way for way in _order(results) if any(way in line for line in lines)]
    table = Table(
        "Milliseconds of a step",
        ["workload", *ways],
        [[line["workload"], *(f"{line[way]:.2f}" if way in line else "–" for way in ways)] for line in lines],
        note="Processor time of one thread, medians over the rounds.",
    )
    ready = Table(
        "Seconds from start to first round",
        ["workload", *ways],
        [
            [name, *(f"{ready[way]:.0f}" if way in ready else "–" for way in ways)]
            for name, ready in ((name, results[name]["seconds_until_ready"]) for name in sorted(results))
        ],
        note="Imports, data and compiling included, three steps too.",
    )
    return Document(
        title="Speed",
        lead="A training step of the library against other ways of taking the same step, in turns, one thread each.",
        findings=[_finding(limit) for limit in limits],
        overview=Table(
            "Compiled step against", ["what", "ratio", "at most"], [[w, f"{r:.2f}", f"{m:.2f}"] for w, r, m in limits]
        ),
        sections=[
            Section("steps", "Steps", "", tables=[table]),
            Section("start", "Before the first step", "", tables=[ready]),
            Section("end-to-end", "End to end", "", tables=[_end_to_end(results)]),
        ],
        method=[
            "Every way runs in a process of its own. Rounds of steps of all of them follow one another; ratios are taken "
            "within a round, and the median over rounds is shown, of several workloads the largest.",
            "Images: a Bayesian decoder of 64-256-256-784 and 10,000 images of uniform noise, encoders of k units. Tiny: "
            "200 rows of 4 numbers, a decoder of 2-4-4. Small: 1,000 rows of 784, a decoder of 20-40-40-784; five at once "
            "is the time of all five. Digits: 1,797 rows of 64, a decoder of 8-64-64-64, as in the default sweep. "
            "Growing tables: the decoder of the images, from 16 latents where it says so, and rows "
            "all over the table in every batch.",
        ],
        provenance=made,
        glossary={
            "compiled, eager": "avi.fit(compile=True), avi.fit(compile=False)",
            "five at once": "avi.fit_many of five models and guides: one step of each",
            "bfloat16": 'avi.fit(compile=True, precision="bfloat16")',
            "hand, hand compiled": "PyTorch written for this model, Adam fused; the whole step as one inductor graph",
            "svi": "Pyro's SVI with Trace_ELBO and our guide, validation off",
            "numpyro": "model and guide in NumPyro, steps in one lax.scan",
            "products": "the matrix products of the step, forward and backward, and nothing else",
        },
        data={"speed.csv": [{"workload": line["workload"], **{way: line.get(way) for way in ways}} for line in lines]},
    )


def _mean_of_numpyro(results) -> tuple[str, float, float] | None:
    ratios = [
        ratio
        for name in _group(results, _IMAGES)
        if (ratio := _ratio(results[name], "compiled", "numpyro")) is not None
    ]
    if len(ratios) < 2:
        return None
    return "NumPyro's step, geometric mean over images", statistics.geometric_mean(ratios), 0.70


def _end_to_end(results: Mapping[str, Mapping]) -> Table:
    """From the records' parts: losses of all ways agree step by step, so that steps stand for a level of the ELBO."""
    rows = []
    for name, result in sorted(results.items()):
        first = result["seconds_until_ready"]
        for way, ms in result["median_ms"].items():
            # A step of five is no step of one, and products are no training.
            if way not in ("five at once", "products"):
                rows.append(
                    [name, way, *(f"{first[way] + count * ms / 1e3:.0f}" for count in _STEPS), _pays(result, way)]
                )
    return Table(
        "Seconds from start to so many steps",
        ["workload", "way", *(f"{count:,}" for count in _STEPS), "compiled is sooner from step"],
        rows,
        note="Seconds of imports, compiling and three steps, then the processor time of the median step so many times. Losses "
        "of all ways agree but for noise, so this is also the time to a level of the ELBO.",
    )


def _pays(result: Mapping, way: str) -> str:
    """From which step on the library's compiled steps are ahead, what came before the first step included."""
    ms, ready = result["median_ms"], result["seconds_until_ready"]
    if way == "compiled" or "compiled" not in ms:
        return ""
    saved, later = ms[way] - ms["compiled"], ready["compiled"] - ready[way]
    if saved <= 0:
        return "–" if later > 0 else "1"
    return f"{max(1, round(later / saved * 1e3)):,}"


def _order(results: Mapping[str, Mapping]) -> list[str]:
    return list(dict.fromkeys(way for result in results.values() for way in result["median_ms"]))


def _line(name: str, result: Mapping) -> dict[str, str | float]:
    return {"workload": name, **{way: round(ms, 4) for way, ms in result["median_ms"].items()}}


def _group(results: Mapping[str, Mapping], group: str) -> list[str]:
    """The workloads that are images, or small models; growing tables are neither."""
    small = {name for name in results if name.startswith(("tiny", "small"))}
    return sorted(small if group == _SMALL else {name for name in results if "rows" not in name} - small)


def _ratio(result: Mapping, way: str, other: str) -> float | None:
    if way not in result["ms"] or other not in result["ms"]:
        return None
    return statistics.median(one / two for one, two in zip(result["ms"][way], result["ms"][other], strict=True))


def _limit(results, what, way, other, workloads, limit) -> tuple[str, float, float] | None:
    names = _group(results, workloads) if isinstance(workloads, str) else workloads
    ratios = [ratio for ratio in (_ratio(results[n], way, other) for n in names if n in results) if ratio is not None]
    return (what, max(ratios), limit) if ratios else None


def _five_at_once(results, what, workload, limit) -> tuple[str, float, float] | None:
    ratio = _ratio(results.get(workload, {"ms": {}}), "five at once", "hand")
    return None if ratio is None else (what, ratio / 5, limit)


def _growth(results, what, few, many, limit) -> tuple[str, float, float] | None:
    if any("compiled" not in results.get(name, {"median_ms": ()})["median_ms"] for name in (few, many)):
        return None
    return f"itself, {what}", results[many]["median_ms"]["compiled"] / results[few]["median_ms"]["compiled"], limit


def _finding(limit: tuple[str, float, float]) -> Finding:
    what, ratio, most = limit
    kept = ratio <= most
    return Finding(
        "check" if kept else "warning",
        f"Against {what}",
        f"{ratio:.2f} of it, {'within' if kept else 'above'} {most:.2f}.",
    )
