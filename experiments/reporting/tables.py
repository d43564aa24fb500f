"""One table for every output: columns declared once give cells for readers and numbers for programs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Literal

from experiments.reporting.statistics import Duration, Mean, significant

Value = str | float | int | bool | Mean | Duration | None


def as_text(value: Value) -> str:
    """A value as a reader gets it: with its error, or in three digits; nothing for None, "-" for what is not finite.

    >>> [as_text(value) for value in (12345, 0.6789, Mean(2.5, 0.25, 3), Duration(20.0, True), None)]
    ['12,345', '0.679', '2.50 ± 0.25', '> 20', '']
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return significant(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def percent(value: Mean | None) -> str:
    """
    >>> percent(Mean(0.432, 0.018, 1)), percent(Mean()), percent(None)
    ('43% ± 2%', '-', '')
    """
    if value is None or not value.known:
        return "-" if value else ""
    return f"{value.value:.0%} ± {value.se:.0%}" if math.isfinite(value.se) else f"{value.value:.0%}"


@dataclass(frozen=True)
class Column:
    """`value` of each line under a `name`; `show` says where: everywhere, not on a terminal ("page"), or in the CSV alone.

    `best`, `max` or `min`, marks the best value of each group of lines; `text` writes a value for readers.
    """

    name: str
    value: Callable[[Any], Value]
    show: Literal["everywhere", "page", "csv"] = "everywhere"
    best: Callable | None = None
    text: Callable[[Any], str] = as_text


@dataclass
class Table:
    """A line of `values`, by the names of the columns, for each of the items.

    Lines that agree in the column `group` are a group. `file` names the CSV file that takes the lines; tables of a report
    may share one.

    >>> columns = [Column("name", lambda person: person[0]), Column("age", lambda person: person[1], best=max)]
    >>> ages = Table("Ages", columns, [("Ada", 36), ("Eve", 9)])
    >>> print(ages.markdown())
    | name | age |
    | --- | --- |
    | Ada | **36** |
    | Eve | 9 |
    >>> print(ages.text())
    Ages
    name  age
    Ada   36
    Eve   9
    """

    title: str
    columns: Sequence[Column]
    items: InitVar[Iterable]
    note: str = ""
    group: str = ""
    file: str = ""
    values: list[dict[str, Value]] = field(init=False)

    def __post_init__(self, items: Iterable) -> None:
        self.values = [{column.name: column.value(item) for column in self.columns} for item in items]

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.show != "csv"]

    @property
    def groups(self) -> list[list[list[tuple[str, bool]]]]:
        """For readers: lines of (cell, whether it is the best of its group) in groups."""
        grouped: dict[Value, list[dict[str, Value]]] = {}
        for line in self.values:
            grouped.setdefault(line.get(self.group), []).append(line)
        return [list(self._marked(lines)) for lines in grouped.values()]

    def _marked(self, lines: list[dict[str, Value]]) -> Iterator[list[tuple[str, bool]]]:
        best = {}
        for column in self.shown:
            known = [_number(line[column.name]) for line in lines if _number(line[column.name]) is not None]
            best[column.name] = column.best(known) if column.best and len(known) > 1 else None
        for line in lines:
            values = [(column, line[column.name]) for column in self.shown]
            yield [(column.text(value), best[column.name] not in (None, "") and _number(value) == best[column.name])
                   for column, value in values]  # fmt: skip

    def markdown(self) -> str:
        """A pipe table."""
        rows = [[f"**{cell}**" if best else cell for cell, best in line] for lines in self.groups for line in lines]
        lines = [[column.name for column in self.shown], ["---"] * len(self.shown), *rows]
        return "\n".join(
            "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def text(self) -> str:
        """Aligned plain text for a terminal."""
        columns = [column for column in self.shown if column.show == "everywhere"]
        rows = [[column.text(line[column.name]) for column in columns] for line in self.values]
        lines = [[column.name for column in columns], *rows]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join([self.title, *(line.rstrip() for line in aligned)])

    def numbers(self) -> list[dict[str, str | float | None]]:
        """For programs: a mean also gives its error, a duration whether it is a lower bound.

        >>> Table("T", [Column("train ELBO", lambda x: x)], [Mean(2.0, 0.5, 2)]).numbers()
        [{'train_elbo': 2.0, 'train_elbo_se': 0.5}]
        """
        return [dict(pair for name, value in line.items() for pair in _numbers(name, value)) for line in self.values]


def _number(value: Value) -> float | None:
    number = value.value if isinstance(value, Mean | Duration) else value
    return number if isinstance(number, float | int) and math.isfinite(number) else None


def _numbers(name: str, value: Value) -> Iterator[tuple[str, str | float | None]]:
    name = re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")
    yield name, value if isinstance(value, str) else _number(value)
    if isinstance(value, Mean):
        yield f"{name}_se", _number(value.se)
    if isinstance(value, Duration):
        yield f"{name}_is_lower_bound", value.censored


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as CSV with a header of every name in them; None and what a line lacks are empty cells.

    >>> csv_text([{"guide": "F-VI", "elbo": -1.5}, {"guide": "constant", "se": None}]).splitlines()
    ['guide,elbo,se', 'F-VI,-1.5,', 'constant,,']
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
