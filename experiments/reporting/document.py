"""What a report is, whatever the sweep: notes, tables and figures, and parts that are the same again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from experiments.reporting.tables import Table


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


class Note(NamedTuple):
    """A sentence or two: the answer, or a warning that keeps from a false conclusion. It may have a figure."""

    kind: Literal["answer", "warning"]
    text: str
    title: str = ""
    figure: Figure | None = None


@dataclass(frozen=True, eq=False)
class Document:
    """A report, or a part of one: `lead` opens it, a blank line between paragraphs; `name` stands for the title in `names`.

    >>> figure = Figure("elbo", "ELBO", "", bytes)
    >>> list(Document("All", parts=[Document("../../x", figures=[figure]), Document("X")]).names.values())
    ['0-', '1-x', '2-x-elbo', '3-x']
    """

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
        """A name for the anchor of every part and the file of every figure, safe whatever the records say."""
        named: dict[Document | Figure, str] = {}
        for part in self.walk():
            words = "" if part is self else part.name or part.title
            named |= {part: words} | {figure: f"{words} {figure.name}" for figure in part.drawings}
        slugs = [re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:80] for words in named.values()]
        return {each: f"{number}-{slug}" for number, (each, slug) in enumerate(zip(named, slugs, strict=True))}
