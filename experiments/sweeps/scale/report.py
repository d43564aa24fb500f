"""The report of the sweep `scale`: what was measured, and what a billion rows cost by it."""

from collections.abc import Mapping

from experiments.reporting.document import Document, Note
from experiments.reporting.records import pick
from experiments.reporting.tables import Column, Table

__all__ = ["document"]

#: Numbers of rows that costs are given for, passes over them, and processes that share the work.
SIZES, PASSES, RANKS = (10**6, 10**7, 10**8, 10**9), 10, 8
READING = """
8 latents and 16 observed numbers a row, a decoder of 8-64-16, batches of 256 rows anywhere in the plate, one thread, eager
steps. First: the rows of a batch were never moved before. Again: the same rows a second time, which memory holds. Cold: the
same rows when the files have been written back and the system has forgotten their pages, so that every row comes from the
disk.
Medians of the steps; processor time is that of the process, the work of the system for it included.

Memory is that of the process alone, its libraries included, without the pages of files, which the system takes back when it
needs them. Reserved: the length of the files of a table on disk.

Costs of more rows are products: hours by the processor time of a step at the largest number of rows that was measured (cold,
where there is such a time), one core, 10 passes; table and moments 4 (3 P + 1) bytes a row in memory, 4 (3 P + 2) on disk;
the order of the rows in a pass 8 bytes a row, in memory; data 4 bytes a number. Network: what each of 8 processes sends in a
pass to average the gradients of what rows share, 2 (1 - 1/8) of their bytes at every step; parameters of rows stay where the
rows are.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    lines = sorted(
        records.values(), key=lambda record: (str(pick(record, "settings", "guide")), _setting(record, "size"))
    )
    columns = [
        Column("guide", lambda record: str(pick(record, "settings", "guide"))),
        Column("rows", lambda record: int(_setting(record, "size")), text="{:,}".format),
        *(
            Column(f"{run}, {what}", lambda record, field=f"{run}_{field}": _result(record, field))
            for run in ("first", "again", "cold")
            for what, field in (("ms", "ms"), ("processor ms", "processor_ms"))
        ),
        Column("kB read a cold step", lambda record: _scaled(record, "cold_read_bytes", 1e3)),
        Column("setup, s", lambda record: _result(record, "setup_seconds"), "page"),
        Column("memory, GB", lambda record: _scaled(record, "anonymous_bytes", 1e9)),
        Column("reserved, GB", lambda record: _scaled(record, "file_bytes", 1e9)),
    ]
    largest = {str(pick(record, "settings", "guide")): record for record in lines}
    costs = [(record, size) for record in largest.values() for size in SIZES]
    return Document(
        title="What many rows cost",
        lead="Steps, memory and disk of the three guides by the number of rows of the plate.",
        notes=[_flatness(lines)] if lines else [],
        tables=[
            Table("Measured", columns, lines, group="guide", file="measured"),
            Table(f"{PASSES} passes over more rows", _cost_columns(), costs, group="guide", file="costs"),
        ],
        parts=[Document("How to read this", READING)],
    )


def _flatness(lines: list[Mapping]) -> Note:
    """How a step grows from the fewest to the most rows."""
    found = []
    for guide in dict.fromkeys(str(pick(record, "settings", "guide")) for record in lines):
        own = [record for record in lines if pick(record, "settings", "guide") == guide]
        few, many = (_result(record, "again_processor_ms") for record in (own[0], own[-1]))
        found.append(f"{guide} {many:.3g} ms at {int(_setting(own[-1], 'size')):,} rows, {many / few:.2f} of that at "
                     f"{int(_setting(own[0], 'size')):,}")  # fmt: skip
    return Note("answer", f"Processor time of a step on rows that memory holds: {'; '.join(found)}.", "A step")


def _cost_columns() -> list[Column]:
    return [
        Column("guide", lambda line: str(pick(line[0], "settings", "guide"))),
        Column("rows", lambda line: line[1], text="{:,}".format),
        Column("table and moments in memory, GB", lambda line: _table_bytes(*line)[0] / 1e9),
        Column("on disk, GB", lambda line: _table_bytes(*line)[1] / 1e9),
        Column("order of the rows, GB", lambda line: 8 * line[1] / 1e9),
        Column("data, GB", lambda line: 4 * _setting(line[0], "numbers") * line[1] / 1e9),
        Column(f"network of {RANKS}, GB a pass", lambda line: _network_bytes(*line) / 1e9),
        Column("hours of one core", lambda line: _hours(*line)),
        Column(f"hours of {RANKS} cores", lambda line: _hours(*line) / RANKS),
    ]


def _table_bytes(record: Mapping, size: int) -> tuple[float, float]:
    width = _result(record, "row_parameters")
    on_disk = pick(record, "settings", "guide") == "factorized on disk"
    if not width:
        return 0.0, 0.0
    return (0.0, 4 * (3 * width + 2) * size) if on_disk else (4 * (3 * width + 1) * size, 0.0)


def _network_bytes(record: Mapping, size: int) -> float:
    steps = size / (_setting(record, "batch") * RANKS)
    return steps * 2 * (1 - 1 / RANKS) * 4 * _result(record, "shared_parameters")


def _hours(record: Mapping, size: int) -> float:
    step = _result(record, "cold_processor_ms") or _result(record, "again_processor_ms")
    return PASSES * size / _setting(record, "batch") * step / 1e3 / 3600


def _setting(record: Mapping, name: str) -> float:
    return float(pick(record, "settings", name))


def _result(record: Mapping, name: str) -> float | None:
    """A number of the result, None where the system or the guide has none."""
    found = pick(record, "result").get(name)
    return None if found is None else float(found)


def _scaled(record: Mapping, name: str, unit: float) -> float | None:
    found = _result(record, name)
    return None if found is None else found / unit
