"""The report of the sweep `overhead`: step times and their ratios."""

from collections.abc import Mapping

from experiments.reporting.document import Document
from experiments.reporting.limits import Limit, verdict
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

#: The most that the ratio of a step is to be, by model.
LIMITS = {"tiny": 1.10, "image": 1.02}
READING = """
Ratio: processor time of a step with the library's guide by that of one written by hand, within a round; medians over rounds.

Tiny: 200 rows of 4 numbers, 2 latents, 20 rows a step. Image: a Bayesian decoder of 64-256-256-784, 1,000 rows a step.
Rows given: the call says which; rows drawn: the model draws them (subsample_size).
"""
COLUMNS = [
    Column("model", "settings.workload"),
    Column("guide", "settings.guide"),
    Column("rows", "settings.rows"),
    Column("rounds", "settings.rounds", "page"),
    Column("steps", "settings.steps", "page"),
    Column("library, ms", "result.guide_ms"),
    Column("by hand, ms", "result.by_hand_ms"),
    Column("ratio", "result.ratio", text="{:.3f}".format),
    Column("lower quartile", lambda record: record["result"]["ratio_quartiles"][0], text="{:.3f}".format),
    Column("upper quartile", lambda record: record["result"]["ratio_quartiles"][1], text="{:.3f}".format),
    Column("at most", lambda record: LIMITS.get(record["settings"]["workload"])),
]


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    lines = sorted(records.values(), key=lambda record: [column.of(record) for column in COLUMNS[:3]])
    table = Table("A training step", COLUMNS, lines, group="model", file="summary")
    limits = []
    for line in (line for line in table.values if line["model"] in LIMITS):
        what = f"{line['model']} model, {line['guide']}, rows {line['rows']}"
        limits.append(Limit(what, *(line[name] for name in ("ratio", "at most", "lower quartile", "upper quartile"))))
    lead = "A step of Pyro's SVI with a guide of the library, against the same guide written by hand for one model."
    return Document(
        "What generality costs", lead, [verdict(limits)], [table], parts=[Document("How to read this", READING)]
    )
