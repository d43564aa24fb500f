"""``python -m experiments.report [NAME]``: records -> figures, tables and one HTML file. It reads, and never trains.

A sweep NAME has a report when the module ``experiments.reports.NAME`` has a function ``document(records)`` that turns
the records, by key, into an `experiments.document.Document`. A sweep of one's own, ``FOLDER/NAME.py`` of a folder that
`PYRO_AVI_SWEEPS` names, brings ``FOLDER/reports/NAME.py``.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import pkgutil
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from experiments import reports
from experiments.document import Document, ReportError, csv_text, not_compiled
from experiments.store import Store, StoreError

TEMPLATES = Path(__file__).parent / "templates"


def names() -> list[str]:
    """The sweeps that have a report."""
    return sorted(module.name for module in pkgutil.iter_modules(reports.__path__))


def document(name: str, out: Path) -> Document:
    """The report of sweep `name` from its records under `out`.

    Raises:
        ReportError: if no such report exists, or the store holds no record of the sweep.
        StoreError: if a record is corrupt.
    """
    if name not in names():
        raise ReportError(f"Expected a sweep with a report, one of {', '.join(names())}; got {name!r}.")
    records = Store(out).records(name)
    if not records:
        raise ReportError(
            f"Expected records of sweep {name!r} under {out}, got none.\n"
            f"Try one of the following fixes:\n"
            f"- run it first: python -m experiments.sweep {name} --out {out}\n"
            f"- name the folder that holds its records: python -m experiments.report {name} --out FOLDER"
        )
    drawn = importlib.import_module(f"experiments.reports.{name}").document(records)
    return replace(drawn, findings=[*drawn.findings, *not_compiled(records)])


def write(name: str, out: Path) -> Path:
    """Write the report of sweep `name` under ``out/name/report`` and return the path of its ``report.html``.

    Beside it lie ``summary.md``, the CSV files and ``figures/*.png``.

    Raises:
        ReportError, StoreError: as `document`.
    """
    return save(document(name, out), Path(out) / name / "report")


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


def table_text(name: str, out: Path) -> str:
    """The report of sweep `name` as plain text for a terminal, as `terminal`.

    Raises:
        ReportError, StoreError: as `document`.
    """
    return terminal(document(name, out))


def terminal(drawn: Document) -> str:
    """What opens a document, in lines of 100 characters at most, and its tables, as plain text."""
    said = [textwrap.fill(f"{finding.title}: {finding.text}", 100) for finding in drawn.findings]
    return "\n\n".join(said + [table.text() for part in drawn.sections for table in part.tables])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Draw a sweep's report from its records, without training."
    )
    parser.add_argument("name", nargs="?", default="images", help="the sweep (default: images)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the store (default: results)")
    chosen = parser.parse_args(argv)
    try:
        drawn = document(chosen.name, chosen.out)
        page = save(drawn, chosen.out / chosen.name / "report")
    except (ReportError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{terminal(drawn)}\n\nReport: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
