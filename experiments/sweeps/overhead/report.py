"""The report of the sweep `overhead`: step times and their ratios."""

from collections.abc import Mapping

from experiments.reporting.document import Document, pick, reading
from experiments.reporting.limits import Limit, verdict
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

#: What the guides are to keep to, by model.
LIMITS = {"tiny": 1.10, "image": 1.02}
READING = """
Rounds of steps with the library's guide and with the one written by hand follow one another in one process on one thread;
the ratio is taken within a round. Processor time, medians over the rounds. Pyro's validation is off. Rows given: the call
says which; rows drawn: the model draws them (subsample_size).

Tiny: 200 rows of 4 numbers, 2 latents, 20 rows a step; an encoder of 16 units. Image: a Bayesian decoder of 64-256-256-784,
1,000 rows a step; an encoder of 64 units.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    lines = sorted(
        records.values(), key=lambda record: [setting(record, name) for name in ("workload", "guide", "rows")]
    )
    limits = [
        Limit(
            f"{model} model, {setting(record, 'guide')}, rows {setting(record, 'rows')}", result(record, "ratio"), most
        )
        for model, most in LIMITS.items()
        for record in lines
        if setting(record, "workload") == model
    ]
    columns = [
        Column("model", lambda record: setting(record, "workload")),
        Column("guide", lambda record: setting(record, "guide")),
        Column("rows", lambda record: setting(record, "rows")),
        Column("rounds", lambda record: pick(record, "settings", "rounds"), "page"),
        Column("steps", lambda record: pick(record, "settings", "steps"), "page"),
        Column("library, ms", lambda record: result(record, "guide_ms")),
        Column("by hand, ms", lambda record: result(record, "by_hand_ms")),
        Column("ratio", lambda record: result(record, "ratio"), text="{:.3f}".format),
        *(Column(name, lambda record, i=i: pick(record, "result", "ratio_quartiles")[i], text="{:.3f}".format)
          for i, name in enumerate(("lower quartile", "upper quartile"))),
        Column("at most", lambda record: LIMITS.get(setting(record, "workload"))),
    ]  # fmt: skip
    return Document(
        title="What generality costs",
        lead="A step of Pyro's SVI with a guide of the library, against the same guide written by hand for one model.",
        notes=[verdict(limits)],
        tables=[Table("A training step", columns, lines, group="model", file="summary")],
        parts=[reading(READING)],
    )


def setting(record: Mapping, name: str) -> str:
    return str(pick(record, "settings", name))


def result(record: Mapping, name: str) -> float:
    return float(pick(record, "result", name))
