"""A report as files: one HTML page, a Markdown summary, CSV files and figures; and as text for a terminal."""

from __future__ import annotations

import base64
import textwrap
from pathlib import Path

import jinja2

from experiments.files import LEFTOVERS, write_whole
from experiments.reporting.document import Document
from experiments.reporting.records import ReportError
from experiments.reporting.tables import csv_text

__all__ = ["data", "render", "save", "terminal"]

TEMPLATES = Path(__file__).parent / "templates"


def save(drawn: Document, folder: Path) -> Path:
    """Write every file of a report into `folder`, each whole or not at all; returns the path of its ``report.html``.

    Raises:
        ReportError: if a file cannot be written.
    """
    figures, page = folder / "figures", folder / "report.html"
    files = {figures / f"{drawn.names[figure]}.png": figure.png for part in drawn.walk() for figure in part.drawings}
    files |= {folder / f"{name}.csv": csv_text(lines).encode() for name, lines in data(drawn).items()}
    files |= {folder / "summary.md": render("summary.md", drawn).encode(), page: render(page.name, drawn).encode()}
    try:
        figures.mkdir(parents=True, exist_ok=True)
        # Figures of a part that left the store would otherwise stay beside those that belong to it; so would a killed write's.
        for stale in {*figures.glob("*.png"), *folder.rglob(LEFTOVERS)} - files.keys():
            stale.unlink()
        for path, content in files.items():
            write_whole(path, content)
    except OSError as error:
        raise ReportError(
            f"Cannot write the report to {folder}: {error.strerror}. The records are untouched.\n"
            "Make the folder writable and free some space, then draw the report again."
        ) from error
    return page


def data(drawn: Document) -> dict[str, list[dict]]:
    """The lines of every CSV file by its name, gathered from the tables."""
    found: dict[str, list[dict]] = {}
    for table in (table for part in drawn.walk() for table in part.tables if table.file):
        found.setdefault(table.file, []).extend(table.numbers())
    return found


def render(template: str, drawn: Document) -> str:
    """The report through one of the templates; HTML is escaped, Markdown is not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    return environment.get_template(template).render(document=drawn, names=drawn.names)


def terminal(drawn: Document) -> str:
    """Answers and warnings in lines of 100 characters at most, and the tables, as plain text."""
    parts = [("" if part is drawn else part.title, part) for part in drawn.walk()]
    notes = [(title, note.title, note.text) for title, part in parts for note in part.notes]
    tables = [table.text() for _, part in parts for table in part.tables if table.brief]
    return "\n\n".join([textwrap.fill(": ".join(filter(None, said)), 100) for said in notes] + tables)
