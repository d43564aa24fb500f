"""The report of the sweep `overhead`: one table of step times and their ratios."""

from collections.abc import Mapping

from experiments.reporting.document import Document, Finding, ReportError, Section, Table, made_by

__all__ = ["document"]

_HEADER = ["model", "guide", "rows", "rounds x steps", "library, ms", "by hand, ms", "ratio", "quartiles"]
# What the guides are to keep to, by model.
_LIMITS = {"tiny": 1.10, "image": 1.02}


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    try:
        lines = sorted((_line(record) for record in records.values()), key=lambda line: list(map(str, line.values())))
        made = made_by(records)
    except KeyError as error:
        raise ReportError(f"Expected records of the sweep overhead, got one without {error}.") from error
    rows = [[str(value) for value in line.values()] for line in lines]
    table = Table(
        "A training step", _HEADER, rows, note="Processor time, medians over the rounds; quartiles of the ratio."
    )
    return Document(
        title="What generality costs",
        lead="A step of Pyro's SVI with a guide of the library, against the same guide written by hand for one model.",
        findings=[_finding(lines, workload, limit) for workload, limit in _LIMITS.items()],
        overview=Table("Against a guide by hand", ["model", "ratio", "at most"], _overview(lines)),
        sections=[Section("steps", "Steps", "Both guides in turns in one process on one thread.", tables=[table])],
        method=[
            "Rounds of steps with the library's guide and with the one written by hand follow one another; the ratio is "
            "taken within a round. Pyro's validation is off.",
            "Tiny: 200 rows of 4 numbers, 2 latents, 20 rows a step; an encoder of 16 units. Image: a Bayesian decoder of "
            "64-256-256-784, 1,000 rows a step; an encoder of 64 units.",
        ],
        provenance=made,
        glossary={"rows given": "the call says which rows", "rows drawn": "the model draws them (subsample_size)"},
        data={"overhead.csv": lines},
    )


def _line(record: Mapping) -> dict[str, str | float]:
    s, r = record["settings"], record["result"]
    low, high = r["ratio_quartiles"]
    return {
        "model": s["workload"],
        "guide": s["guide"],
        "rows": s["rows"],
        "rounds": f"{s['rounds']} x {s['steps']}",
        "library_ms": round(r["guide_ms"], 3),
        "by_hand_ms": round(r["by_hand_ms"], 3),
        "ratio": round(r["ratio"], 3),
        "quartiles": f"{low:.3f} .. {high:.3f}",
    }


def _overview(lines: list[dict]) -> list[list[str]]:
    found = {name: [line["ratio"] for line in lines if line["model"] == name] for name in _LIMITS}
    return [[k, f"{min(v):.2f} to {max(v):.2f}", f"{_LIMITS[k]:.2f}"] for k, v in found.items() if v]


def _finding(lines: list[dict], workload: str, limit: float) -> Finding:
    ratios = {f"{line['guide']} (rows {line['rows']})": line["ratio"] for line in lines if line["model"] == workload}
    if not ratios:
        return Finding("warning", f"The {workload} model", "Not measured.")
    above = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio > limit]
    held = f"All of them keep to {limit:.2f}." if not above else f"Above {limit:.2f}: {', '.join(above)}."
    text = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} of a step by hand. {held}"
    return Finding("warning" if above else "check", f"The {workload} model", text)
