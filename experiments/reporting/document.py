"""What a report consists of, whatever the sweep: findings, figures and tables in sections."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

Value = str | float | int | bool | None


class ReportError(ValueError):
    """A report that cannot be drawn or written: what was asked for, what there is, and what to do."""


def plain_name(name: str) -> str:
    """The name where it can stand in that of a file; else one without what could lead elsewhere, with digits of its own.

    >>> plain_name("mnist-dense-0.3"), plain_name("../../pwn")
    ('mnist-dense-0.3', '.._.._pwn-5e4365ad')
    """
    if re.fullmatch(r"[A-Za-z0-9_.+=-]{1,100}", name):
        return name
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.+=-]', '_', name)[:90]}-{digits}"


@dataclass(frozen=True)
class Figure:
    """A drawing: `name` becomes the file's, `caption` says how to read it, `draw` makes the PNG when it is needed."""

    name: str
    title: str
    caption: str
    draw: Callable[[], bytes]

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", plain_name(self.name))

    @cached_property
    def png(self) -> bytes:
        return self.draw()


@dataclass(frozen=True)
class Finding:
    """A sentence or two that the numbers speak; `kind` is "result", "check" (held), or "warning".

    A finding that opens a report may have the `figure` that shows it.
    """

    kind: str
    title: str
    text: str
    figure: Figure | None = None


@dataclass(frozen=True)
class Table:
    """Formatted cells under a header; `brief` names the columns that fit a terminal (all of them when empty)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    brief: Sequence[str] = ()

    def text(self) -> str:
        """Aligned plain text for a terminal.

        >>> print(Table("Ages", ["name", "age"], [["Ada", "36"], ["Grace", "85"]]).text())
        Ages
        name   age
        Ada    36
        Grace  85
        """
        chosen = [i for i, name in enumerate(self.header) if not self.brief or name in self.brief]
        lines = [[row[i] for i in chosen] for row in [self.header, *self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(chosen))]
        aligned = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.title, *(line.rstrip() for line in aligned)])

    def markdown(self) -> str:
        """A pipe table.

        >>> print(Table("Ages", ["name", "age"], [["Ada", "36"]]).markdown())
        | name | age |
        | --- | --- |
        | Ada | 36 |
        """
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Section:
    """One part of a report; `name` is its anchor and the prefix of its figures' files."""

    name: str
    title: str
    lead: str
    findings: Sequence[Finding] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()

    def __post_init__(self) -> None:
        # Often the name of a data set, which a record that came from elsewhere may call as it likes.
        object.__setattr__(self, "name", plain_name(self.name))


@dataclass(frozen=True)
class Document:
    """A whole report. `data` maps the name of a CSV file to its lines, one mapping a line, all with the same keys."""

    title: str
    lead: str
    findings: Sequence[Finding]
    overview: Table
    sections: Sequence[Section]
    method: Sequence[str]
    provenance: Table
    glossary: Mapping[str, str]
    data: Mapping[str, Sequence[Mapping[str, Value]]] = field(default_factory=dict)

    @property
    def drawings(self) -> dict[str, Figure]:
        """Every figure by the name of its file."""
        opening = {f"{finding.figure.name}.png": finding.figure for finding in self.findings if finding.figure}
        return opening | {f"{part.name}-{figure.name}.png": figure for part in self.sections for figure in part.figures}


def csv_text(lines: Sequence[Mapping[str, Value]]) -> str:
    """The lines as CSV with a header, None as an empty cell.

    >>> csv_text([{"guide": "F-VI", "elbo": -1.5}, {"guide": "constant", "elbo": None}]).splitlines()
    ['guide,elbo', 'F-VI,-1.5', 'constant,']
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def made_by(records: Mapping[str, Mapping]) -> Table:
    """By what the records were made: every commit, machine, version of torch and command once.

    Raises:
        KeyError: if a record does not say it.
    """

    def line(provenance: Mapping) -> tuple[str, str, str, str]:
        machine = provenance["machine"]
        described = f"{machine['processor']}, {machine['cores']} cores"
        return str(provenance["commit"])[:7], described, provenance["versions"]["torch"], provenance["command"]

    lines = sorted({line(record["provenance"]) for record in records.values()})
    return Table("Made by", ["commit", "machine", "torch", "command"], lines)


def not_compiled(records: Mapping[str, Mapping]) -> list[Finding]:
    """A warning of the records with numbers that were evaluated eagerly though they were to be compiled."""
    reasons = [record["provenance"].get("fallbacks") or [] for record in records.values()]
    count = sum(map(bool, reasons))
    if not count:
        return []
    text = (
        f"{count} of {len(records)} cells hold numbers that were to be compiled and were evaluated eagerly, which rounds sums "
        "differently: the last digits, and what a choice makes of them, may be those of no other machine. "
    )
    return [Finding("warning", "Not compiled", text + " ".join(sorted({reason for of in reasons for reason in of})))]
