"""A sweep of a newcomer's: what n to the p is, with a table and a figure."""

import time

from experiments.runner.cell import Cell

summary = "powers of whole numbers"


def add_arguments(parser):
    """The options of this sweep."""
    parser.add_argument("--numbers", type=int, default=4, help="how many (default: 4)")


def plan(options, records):
    """A cell for every number and power."""
    return [Cell("powers", {"n": n, "power": power}) for power in (2, 3) for n in range(1, options.numbers + 1)]


def count(options):
    """The cells of all stages."""
    return 2 * options.numbers


def describe(cell):
    """A short label."""
    return f"{cell.settings['n']} to the power of {cell.settings['power']}"


def estimate(cell, *, device):
    """Seconds, roughly."""
    return 0.01


def run(settings, context):
    """The power, and how long it took to take it."""
    began = time.perf_counter()
    return {"value": settings["n"] ** settings["power"], "seconds": time.perf_counter() - began}


def document(records):
    """The report of these records, by key."""
    from experiments.reporting.document import Document, Figure, Note
    from experiments.reporting.figures import drawn, panels
    from experiments.reporting.tables import Column, Table

    cells = sorted(((r["settings"], r["result"]) for r in records.values()), key=lambda cell: sorted(cell[0].items()))

    @drawn
    def lines():
        figure, axes = panels(1, 1)
        for power in (2, 3):
            points = [(s["n"], r["value"]) for s, r in cells if s["power"] == power]
            axes[0, 0].plot(*zip(*points, strict=True), label=f"power {power}")
        axes[0, 0].legend()
        return figure

    columns = [
        Column("n", lambda cell: cell[0]["n"]),
        Column("power", lambda cell: cell[0]["power"]),
        Column("value", lambda cell: cell[1]["value"]),
    ]
    return Document(
        "Powers",
        notes=[Note("answer", f"The largest is {max(r['value'] for _, r in cells):,}.")],
        tables=[Table("All of them", columns, cells, file="summary")],
        figures=[Figure("lines", "By number", "A line a power.", lines)],
    )
