"""Records: whole or not at all, each cell once, whatever happens to the writers and the disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.runner.cell import Cell
from experiments.runner.store import FORMAT, Store, StoreError

REPOSITORY = Path(__file__).resolve().parents[3]
CELL = Cell("tiny", {"seed": 0, "kind": "plain"})


def record_of(cell, value=1.5):
    return {
        "format": FORMAT,
        "sweep": cell.sweep,
        "key": cell.key,
        "settings": dict(cell.settings),
        "result": {"value": value, "curve": [1.0, None]},
        "provenance": {"seconds": 1.0},
    }


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def files(store):
    return sorted(path.name for path in store.folder("tiny").iterdir())


def test_what_is_saved_is_read_back(store):
    cells = [Cell("tiny", {"seed": seed}) for seed in range(3)]
    for cell in cells:
        assert store.save(record_of(cell, cell.settings["seed"])) == store.path(cell)
    assert Store(store.out).records("tiny") == {cell.key: record_of(cell, cell.settings["seed"]) for cell in cells}
    assert store.load(cells[1]) == record_of(cells[1], 1)
    assert files(store) == sorted(f"{cell.key}.json" for cell in cells)


def test_reading_an_empty_store_makes_nothing(store):
    assert store.records("tiny") == {} and store.load(CELL) is None
    assert not store.out.exists()


def test_saving_again_replaces(store):
    store.save(record_of(CELL, 1))
    store.save(record_of(CELL, 2))
    assert store.records("tiny") == {CELL.key: record_of(CELL, 2)}


OTHER = Cell("tiny", {"seed": 1, "kind": "plain"})
CORRUPT = {
    "cut": (lambda text: text[: len(text) // 2], "no valid JSON"),
    "empty": (lambda text: "", "no valid JSON"),
    "not text": (lambda text: b"\xff\xfe\x00", "no valid JSON"),
    "not finite": (lambda text: text.replace("1.5", "NaN"), "NaN is no JSON number"),
    "a list": (lambda text: "[]", "expected a JSON object, got a list"),
    "another format": (lambda text: text.replace('"format":1', '"format":99'), "expected format 1, got 99"),
    "no result": (lambda text: text.replace('"result"', '"other"'), 'expected "result" to be a dict, got None'),
    "changed settings": (lambda text: text.replace('"seed":0', '"seed":7'), "its settings have the key"),
    "another cell's": (lambda text: json.dumps(record_of(OTHER)), f"it belongs to tiny/cells/{OTHER.key}.json"),
    "another sweep's": (
        lambda text: json.dumps(record_of(Cell("other", CELL.settings))),
        "it belongs to other/cells/",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_record_is_named_with_what_to_do(store, case):
    change, message = CORRUPT[case]
    path = store.save(record_of(CELL))
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    for read in (lambda: store.records("tiny"), lambda: store.load(CELL)):
        with pytest.raises(StoreError) as error:
            read()
        assert str(path) in str(error.value) and message in str(error.value)
        assert "Move it away or delete it: its cell is run again" in str(error.value)


def test_a_malformed_record_is_not_saved(store):
    with pytest.raises(StoreError, match="its settings have the key"):
        store.save({**record_of(CELL), "key": OTHER.key})
    assert store.records("tiny") == {}


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_write_that_fails_leaves_no_half_file(store, monkeypatch, call, number):
    store.save(record_of(OTHER))

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*("builtins.open", refuse) if call == "open" else (f"os.{call}", refuse))
        with pytest.raises(StoreError) as error:
            store.save(record_of(CELL))
    message = str(error.value)
    assert str(store.path(CELL)) in message and os.strerror(number) in message
    assert "finished cells are kept" in message and "the same command resumes" in message
    assert files(store) == [f"{OTHER.key}.json"]
    store.save(record_of(CELL))
    assert set(store.records("tiny")) == {CELL.key, OTHER.key}


def test_a_folder_that_cannot_be_made_is_met_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"Cannot write records below .*file.results.*--out"):
        Store(tmp_path / "file" / "results").prepare("tiny")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_met_before_any_work(store, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match=f"{os.strerror(number)}. Nothing was run.*--out"):
        store.prepare("tiny")
    assert files(store) == []


# A process that claims the cell, says so, and lives until it is killed.
HOLDER = """
import sys, time
from experiments.runner.cell import Cell
from experiments.runner.store import Store
store, cell = Store(sys.argv[1]), Cell("tiny", {"seed": 0, "kind": "plain"})
with store.claim(cell) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(store):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.out)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "True\n"
    yield process
    process.kill()
    process.communicate()


def test_a_claim_excludes_other_processes_and_ends_with_its_own(store, holder):
    with store.claim(CELL) as mine, store.claim(OTHER) as other:
        assert (mine, other) == (False, True)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with store.claim(CELL) as mine:
            assert mine


def test_a_cell_is_saved_under_its_own_claim(store):
    with store.claim(CELL) as mine:
        assert mine
        store.save(record_of(CELL))
        with Store(store.out).claim(CELL) as second:
            assert not second
    assert store.load(CELL) == record_of(CELL)


def test_leftovers_are_ignored_and_removed_once_their_writer_is_dead(store, holder):
    store.save(record_of(OTHER))
    half = store.folder("tiny") / f"{CELL.key}.123.abcd.tmp"
    half.write_text('{"format":1,"sw')
    orphan = store.folder("tiny") / f"{OTHER.key}.124.abcd.tmp"
    orphan.write_text("")
    assert set(store.records("tiny")) == {OTHER.key}
    store.prepare("tiny")
    assert files(store) == sorted([half.name, f"{OTHER.key}.json"])
    holder.kill()
    holder.wait()
    store.prepare("tiny")
    assert files(store) == [f"{OTHER.key}.json"]
