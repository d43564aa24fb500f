"""``python -m experiments.report [NAME]``: records -> figures, tables and one HTML file. It reads, and never trains.

A sweep has a report when its module has a function ``document(records)``: see `experiments.sweeps`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from experiments.reporting.document import Document, Note
from experiments.reporting.pages import save, terminal
from experiments.reporting.provenance import made_by, warnings
from experiments.reporting.records import ReportError
from experiments.runner import registry
from experiments.runner.store import Store, StoreError

__all__ = ["document", "draw", "has_report", "main", "names"]


def names() -> list[str]:
    """The sweeps that have a report."""
    return [name for name in registry.names() if has_report(name)]


def has_report(name: str) -> bool:
    """Whether the sweep `name` has a report."""
    return hasattr(registry.find(name), "document")


def document(name: str, out: Path) -> Document:
    """The report of sweep `name` from its records under `out`, with what every report says of its records.

    Raises:
        ReportError: if no such report exists, or the store holds no record of the sweep.
        StoreError: if a record cannot be read, or a later version of this code wrote it.
    """
    if name not in registry.names() or not has_report(name):
        raise ReportError(f"Expected a sweep with a report, one of {', '.join(names())}; got {name!r}.")
    contents = Store(out).read(name)
    if not contents.records:
        raise ReportError(
            f"Expected records of sweep {name!r} under {out}, got none.\n"
            f"Try one of the following fixes:\n"
            f"- run it first: python -m experiments.sweep {name} --out {out}\n"
            f"- name the folder that holds its records: python -m experiments.report {name} --out FOLDER"
        )
    drawn = registry.find(name).document(contents.records)
    notes = [*drawn.notes, *warnings(contents.records)]
    if damaged := [f"{path.name} ({reason})" for path, reason in contents.damaged.items()]:
        text = f"{len(damaged)} files are damaged or foreign, and no numbers are taken from them: {'; '.join(damaged)}."
        notes.append(Note("warning", text, "Left out"))
    return replace(drawn, notes=notes, parts=[*drawn.parts, made_by(contents.records)])


def draw(name: str, out: Path) -> tuple[Path, str]:
    """Write the report of sweep `name` under ``out/name/report``.

    Returns the path of its ``report.html``, beside which lie ``summary.md``, CSV files and ``figures/*.png``, and what it says
    as plain text for a terminal.

    Raises:
        ReportError, StoreError: as `document`.
    """
    drawn = document(name, out)
    return save(drawn, Path(out) / name / "report"), terminal(drawn)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report", description="Draw a sweep's report from its records, without training."
    )
    parser.add_argument("name", nargs="?", default="images", help="the sweep (default: images)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the store (default: results)")
    chosen = parser.parse_args(argv)
    try:
        page, text = draw(chosen.name, chosen.out)
    except (ReportError, StoreError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{text}\n\nReport: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
