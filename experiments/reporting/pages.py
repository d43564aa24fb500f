"""A document as files: one HTML page, a Markdown summary, CSV files and figures; and as text for a terminal."""

from __future__ import annotations

import base64
import re
import textwrap
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from experiments.reporting.document import Document, ReportError, csv_text

__all__ = ["render", "save", "terminal"]

TEMPLATES = Path(__file__).parent / "templates"


def save(drawn: Document, folder: Path) -> Path:
    """Write every file of a document into `folder`; returns the path of its ``report.html``.

    Raises:
        ReportError: if a file cannot be written.
    """
    figures, page = folder / "figures", folder / "report.html"
    files = {folder / file: csv_text(lines).encode() for file, lines in drawn.data.items()}
    files[folder / "summary.md"] = render("summary.md", drawn).encode()
    files |= {figures / name: figure.png for name, figure in drawn.drawings.items()}
    files[page] = render("report.html", drawn).encode()
    try:
        figures.mkdir(parents=True, exist_ok=True)
        # Figures of a section that left the store would otherwise stay beside those that belong to it.
        for stale in set(figures.glob("*.png")) - files.keys():
            stale.unlink()
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise ReportError(
            f"Cannot write the report to {folder}: {error.strerror}. The records are untouched.\n"
            "Make the folder writable and free some space, then draw the report again."
        ) from error
    return page


def render(template: str, drawn: Document) -> str:
    """The document through one of the templates; HTML is escaped, Markdown is not."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    environment.filters["unbroken"] = unbroken
    return environment.get_template(template).render(document=drawn)


def unbroken(text: str) -> Markup:
    """HTML in which names of guides, and numbers with their errors, stay on one line.

    >>> print(unbroken("A-VI k=64 < F-VI"))
    <span class="nb">A-VI k=64</span> &lt; <span class="nb">F-VI</span>
    """
    return Markup(
        re.sub(
            r"[AF]-VI(?:(?: from)? k=\d+)?|-?[\d.,]+ ± [\d.,]*\d", r'<span class="nb">\g<0></span>', str(escape(text))
        )
    )


def terminal(drawn: Document) -> str:
    """What opens a document, in lines of 100 characters at most, and its tables, as plain text."""
    said = [textwrap.fill(f"{finding.title}: {finding.text}", 100) for finding in drawn.findings]
    return "\n\n".join(said + [table.text() for part in drawn.sections for table in part.tables])
