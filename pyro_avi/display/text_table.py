"""Tables as text."""

from collections.abc import Sequence

__all__ = ["check_format", "text_table"]


def check_format(format: str) -> None:
    """Refuse an unknown format of a table.

    Args:
        format: ``"text"``, ``"markdown"`` or ``"frame"``.

    Raises:
        ValueError: if it is none of these.
    """
    if format not in ("text", "markdown", "frame"):
        raise ValueError(f'Expected format to be "text", "markdown" or "frame", got {format!r}.')


def text_table(cells: Sequence[Sequence[str]], notes: str, *, format: str) -> str:
    """A table as text, with notes below.

    Args:
        cells: rows of the same length, the first one the header. The first column is aligned left, the others right.
        notes: a line of text.
        format: ``"text"`` or ``"markdown"``.
    """
    if format == "markdown":
        lines = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in cells]
        return "\n".join([lines[0], "| --- |" + " ---: |" * (len(cells[0]) - 1), *lines[1:], "", notes])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in cells
    ]
    return "\n".join([*(line.rstrip() for line in lines), notes])
