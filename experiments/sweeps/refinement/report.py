"""The report of the sweep `refinement`: what steps leave of the amortization gap, and their seconds."""

from collections.abc import Mapping

from experiments.reporting.document import Document, Figure
from experiments.reporting.figures import CONSTANT, FACTORIZED, RAMP, Curve, Panel, curves
from experiments.reporting.statistics import Mean
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

COLOURS = {"encoder": RAMP[3], "prior": FACTORIZED, "scratch": CONSTANT}
READING = """
Short of the best: the mean over test rows of the ELBO of their best factors, after 400 steps from the encoder's output, minus
that of their factors, by the same draws; nats a row, with the standard error over rows. Gap closed: of the amortization gap.

Seconds: of one core, for all rows together, with the draws by which a row's gain is tested; 0 for the start itself.
"""
COLUMNS = [
    Column("data", lambda line: line["data"]),
    Column("seed", lambda line: line["seed"], "page"),
    Column("start", lambda line: line["start"]),
    Column("steps", lambda line: line["steps"]),
    Column("seconds", lambda line: line["seconds"]),
    Column("ELBO", lambda line: line["elbo"]),
    Column("short of the best", lambda line: Mean(line["short"], line["short_se"], 1)),
    Column("gap closed", lambda line: 1 - line["short"] / line["gap"], text="{:.0%}".format),
]


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key."""
    ordered = sorted(records.values(), key=lambda record: (record["settings"]["dataset"], record["settings"]["seed"]))
    lines = [
        {
            **line,
            "data": record["settings"]["dataset"],
            "seed": record["settings"]["seed"],
            "gap": record["result"]["gap"],
        }
        for record in ordered
        for line in record["result"]["lines"]
    ]
    lead = "The bound of held-out rows by seconds of refinement, decoder fixed, from the encoder, from the prior, from scratch."
    figure = Figure("refinement", "Bound by seconds", "Corners: 1, 5, 20 and 100 steps.", lambda: _draw(ordered))
    table = Table("Refinement", COLUMNS, lines, group="data", file="refinement")
    return Document(
        "What closing the gap costs",
        lead,
        tables=[table],
        figures=[figure],
        parts=[Document("How to read this", READING)],
    )


def _draw(records: list[Mapping]) -> bytes:
    """A panel for each data set, by its first seed, from somewhat below the encoder's own bound upwards."""
    first = {record["settings"]["dataset"]: record["result"] for record in reversed(records)}
    row = []
    for name, result in sorted(first.items()):
        found = []
        for start, colour in COLOURS.items():
            points = [line for line in result["lines"] if line["start"] == start and line["steps"]]
            found.append(Curve(start, colour, [p["seconds"] for p in points], [-p["short"] for p in points]))
        level = {"level": -result["gap"], "named": "the encoder's own output"}
        row.append(Panel("seconds", "ELBO above that of the best factors", found, title=name, **level))
    return curves([row], low=-1.25 * max(result["gap"] for result in first.values()))
