"""What a report is, whatever the sweep: notes, tables and figures, and parts that are the same again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from experiments.reporting.tables import Table


class ReportError(ValueError):
    """A report that cannot be drawn or written: what was asked for, what there is, and what to do."""


@dataclass(frozen=True, eq=False)
class Figure:
    """A drawing: `name` ends that of its file, `caption` says how to read it, `draw` makes the PNG when it is needed."""

    name: str
    title: str
    caption: str
    draw: Callable[[], bytes]

    @cached_property
    def png(self) -> bytes:
        return self.draw()


@dataclass(frozen=True)
class Note:
    """A sentence or two: the answer, a warning that keeps from a false conclusion, or how to read. It may have a figure."""

    kind: Literal["answer", "warning", "reading"]
    text: str
    title: str = ""
    figure: Figure | None = None


@dataclass(frozen=True, eq=False)
class Document:
    """A report, or a part of one: it opens with its notes. `name` stands for the title in anchors and files."""

    title: str
    lead: str = ""
    notes: Sequence[Note] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    parts: Sequence[Document] = ()
    name: str = ""

    def walk(self) -> Iterator[Document]:
        """This and all that it consists of, in order."""
        yield self
        for part in self.parts:
            yield from part.walk()

    @property
    def drawings(self) -> list[Figure]:
        """The figures of this part alone."""
        return [*(note.figure for note in self.notes if note.figure), *self.figures]

    @cached_property
    def names(self) -> dict[Document | Figure, str]:
        """A name for the anchor of every part and the file of every figure, safe whatever the records say.

        >>> figure = Figure("elbo", "ELBO", "", bytes)
        >>> list(Document("All", parts=[Document("../../x", figures=[figure]), Document("X")]).names.values())
        ['0-', '1-x', '2-x-elbo', '3-x']
        """
        named: list[tuple[Document | Figure, str]] = []
        for part in self.walk():
            words = "" if part is self else part.name or part.title
            named += [(part, words), *((figure, f"{words} {figure.name}") for figure in part.drawings)]
        slugs = [re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80] for _, words in named]
        return {each: f"{number}-{slug}" for number, ((each, _), slug) in enumerate(zip(named, slugs, strict=True))}


def reading(text: str) -> Document:
    """The part that says how numbers were made and words are meant, a note a paragraph of the text."""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return Document("How to read this", notes=[Note("reading", paragraph) for paragraph in paragraphs], name="reading")


def pick(record: Mapping, *path: str) -> object:
    """The value at `path` of a record, None below a null.

    Raises:
        ReportError: if the record has no such field.
    """
    value: object = record
    for name in path:
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise ReportError(
                f"Expected {'.'.join(path)} in the record {record.get('key')!r}, got none.\n"
                "It was written by another version of the sweep: move its file away and run the sweep again."
            )
        value = value[name]
    return value


def listed(items: Sequence[str]) -> str:
    """The items in a sentence.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def counted(count: int, what: str) -> str:
    """
    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"
