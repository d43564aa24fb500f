"""One table for every output: columns declared once give cells for readers and numbers for programs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import pandas

from experiments.reporting.records import pick
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


class Column(NamedTuple):
    """`value` of each item, under a `name`: a function of it, or the path of an attribute or a record's field.

    `show` says where: everywhere, not on a terminal ("page"), or in the CSV alone. `best`, `max` or `min`, marks the best
    value of each group of lines; `text` writes a value for readers.
    """

    name: str
    value: Callable[[Any], Value] | str
    show: Literal["everywhere", "page", "csv"] = "everywhere"
    best: Callable | None = None
    text: Callable[[Any], str] = as_text

    def of(self, item: Any) -> Value:
        if callable(self.value):
            return self.value(item)
        return pick(item, *self.value.split(".")) if isinstance(item, Mapping) else attrgetter(self.value)(item)


@dataclass
class Table:
    """A line of `values`, by the names of the columns, for each of the items.

    Lines that follow one another and agree in the column `group` are a group. `file` names the CSV file that takes the
    lines; tables of a report may share one.

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
        self.values = [{column.name: column.of(item) for column in self.columns} for item in items]

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.show != "csv"]

    @property
    def brief(self) -> list[Column]:
        return [column for column in self.columns if column.show == "everywhere"]

    @property
    def groups(self) -> list[list[tuple[tuple[str, bool], ...]]]:
        """For readers: lines of (cell, whether it is the best of its group) in groups."""
        grouped = [list(lines) for _, lines in itertools.groupby(self.values, lambda line: line.get(self.group))]
        return [list(zip(*(_cells(column, lines) for column in self.shown), strict=True)) for lines in grouped]

    def markdown(self) -> str:
        """A pipe table."""
        rows = [[f"**{cell}**" if best else cell for cell, best in line] for lines in self.groups for line in lines]
        lines = [[column.name for column in self.shown], ["---"] * len(self.shown), *rows]
        escaped = ([re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def text(self) -> str:
        """Aligned plain text for a terminal."""
        cells = [[column.name, *(column.text(line[column.name]) for line in self.values)] for column in self.brief]
        padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in cells]
        return "\n".join([self.title, *("  ".join(line).rstrip() for line in zip(*padded, strict=True))])

    def numbers(self) -> list[dict[str, str | float | None]]:
        """For programs: a mean also gives its error, a duration whether it is a lower bound.

        >>> Table("T", [Column("train ELBO", lambda x: x)], [Mean(2.0, 0.5, 2)]).numbers()
        [{'train_elbo': 2.0, 'train_elbo_se': 0.5}]
        """
        return [dict(pair for name, value in line.items() for pair in _numbers(name, value)) for line in self.values]


def _cells(column: Column, lines: Sequence[Mapping[str, Value]]) -> list[tuple[str, bool]]:
    numbers = [_number(line[column.name]) for line in lines]
    known = [number for number in numbers if number is not None]
    best = column.best(known) if column.best and len(known) > 1 else None
    return [
        (column.text(line[column.name]), best is not None and number == best)
        for line, number in zip(lines, numbers, strict=True)
    ]


def _number(value: Value) -> float | None:
    number = value.value if isinstance(value, Mean | Duration) else value
    return number if isinstance(number, float | int) and math.isfinite(number) else None


def _numbers(name: str, value: Value) -> Iterator[tuple[str, str | float | None]]:
    # The path of a field stays as it is.
    name = name if "." in name else re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    yield name, value if isinstance(value, str) else _number(value)
    if isinstance(value, Mean):
        yield f"{name}_se", _number(value.se)
    if isinstance(value, Duration):
        yield f"{name}_is_lower_bound", value.censored


def csv_text(lines: Iterable[Mapping[str, Any]]) -> str:
    """The lines as CSV with a header of every name in them; None and what a line lacks are empty cells.

    >>> csv_text([{"guide": "F-VI", "elbo": -1.5}, {"guide": "constant", "se": None}]).splitlines()
    ['guide,elbo,se', 'F-VI,-1.5,', 'constant,,']
    """
    # As objects: whole numbers beside empty cells stay whole.
    return pandas.DataFrame(lines, dtype=object).to_csv(index=False)
