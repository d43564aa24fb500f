"""Reports of stores that hold what nobody here has written."""

import doctest
import re
import types

import pytest

from experiments import report
from experiments.reporting import document, figures, limits, provenance, records, statistics, tables
from experiments.reporting.document import Document, Figure, Note
from experiments.runner.cell import Cell
from experiments.runner.record import FORMAT
from experiments.runner.store import Store
from experiments.sweeps.suboptimality.report import rows

PROVENANCE = {
    "commit": "a" * 40, "machine": {"processor": "P", "cores": 2}, "versions": {"torch": "2"}, "command": "c",
}  # fmt: skip


def drawn_from(records):
    """A report that takes the names of its parts from the records, as those of the sweeps do."""
    names = [record["settings"]["dataset"] for record in records.values()]
    figures = [Figure(name, name, "", lambda: b"png") for name in names]
    opening = [Note("answer", "", name, figure) for name, figure in zip(names, figures, strict=True)]
    figures = [Figure(name, name, "", lambda: b"png") for name in names]
    return Document(
        "", notes=opening, parts=[Document(name, figures=[f]) for name, f in zip(names, figures, strict=True)]
    )


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store deep in an empty folder, and the report above as that of the sweep `images`."""
    monkeypatch.setattr(report.registry, "find", lambda name: types.SimpleNamespace(document=drawn_from))
    return Store(tmp_path / "a" / "b" / "c" / "results")


def save(store, dataset):
    cell = Cell("images", {"dataset": dataset})
    named = {"format": FORMAT, "sweep": "images", "key": cell.key, "settings": dict(cell.settings)}
    return store.save({**named, "result": {}, "provenance": PROVENANCE})


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "module",
    [document, figures, limits, provenance, records, statistics, tables, rows],
    ids=lambda module: module.__name__,
)
def test_the_docstrings_hold(module):
    done = doctest.testmod(module)
    assert done.failed == 0 < done.attempted


@pytest.mark.parametrize("dataset", ["../../../../pwn", "/tmp/pwn", "a\x00b", "x" * 300, "..", "é/<script>"])
def test_names_in_records_are_no_paths(store, tmp_path, dataset):
    save(store, dataset)
    page = report.draw("images", store.out)[0]
    assert files(tmp_path) == files(store.out / "images")
    drawn = list((page.parent / "figures").iterdir())
    assert len(drawn) == 2 and all(path.suffix == ".png" and path.read_bytes() == b"png" for path in drawn)
    assert all(f"figures/{path.name}" in (page.parent / "summary.md").read_text() for path in drawn)
    assert "<script>" not in page.read_text()


def test_other_names_have_other_files():
    names = ["../a", "/../a", "..", "a/b", "a_b", "a\\b", "x" * 101, "x" * 102, "é", "é ", "", "\udcff"]
    drawn = Document("", parts=[Document(name, figures=[Figure(name, "", "", bytes)]) for name in names])
    found = list(drawn.names.values())
    assert len(found) == len(set(found)) == 2 * len(names) + 1
    assert all(re.fullmatch("[a-z0-9-]{1,100}", name) for name in found)


def test_what_is_damaged_is_left_out_and_told(store):
    save(store, "whole")
    path = save(store, "damaged")
    path.write_text(path.read_text().replace('"result":{}', '"result":{ }'))
    before = path.read_text()
    (path.parent / "notes.json").write_text("<script>")
    text = report.draw("images", store.out)[0].read_text()
    assert "2 files are damaged or foreign, and no numbers are taken from them" in text and "<script>" not in text
    assert f"{path.name} (its checksum is another" in text and path.read_text() == before
