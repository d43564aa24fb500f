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
from experiments.runner.record import FORMAT, encode
from experiments.runner.store import Contents, Store, StoreError

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
    assert Store(store.out).read("tiny").records == {cell.key: record_of(cell, cell.settings["seed"]) for cell in cells}
    assert store.load(cells[1]) == record_of(cells[1], 1)
    assert files(store) == sorted(f"{cell.key}.json" for cell in cells)


def test_reading_an_empty_store_makes_nothing(store):
    assert store.read("tiny").records == {} and store.load(CELL) is None
    assert not store.out.exists()


def test_saving_again_replaces(store):
    store.save(record_of(CELL, 1))
    store.save(record_of(CELL, 2))
    assert store.read("tiny").records == {CELL.key: record_of(CELL, 2)}


OTHER = Cell("tiny", {"seed": 1, "kind": "plain"})


def text_of(record):
    return encode(record).decode()


def earlier(record):
    """As the first version wrote it."""
    return json.dumps({**record, "format": 1}, separators=(",", ":")) + "\n"


CORRUPT = {
    "cut": (lambda text: text[: len(text) // 2], "its checksum is another: it was cut or changed"),
    "a changed number": (lambda text: text.replace("1.5", "1.6"), "its checksum is another: it was cut or changed"),
    "empty": (lambda text: "", "no valid JSON"),
    "not text": (lambda text: b"\xff\xfe\x00", "no valid JSON"),
    "a list": (lambda text: "[]", "expected a JSON object, got a list"),
    "cut, of format 1": (lambda text: earlier(record_of(CELL))[:50], "no valid JSON"),
    "not finite": (lambda text: earlier(record_of(CELL)).replace("1.5", "NaN"), "NaN is no JSON number"),
    "no result": (
        lambda text: earlier(record_of(CELL)).replace('"result"', '"other"'),
        "expected \"result\" to be a dict, got 'None'",
    ),
    "changed settings": (
        lambda text: earlier(record_of(CELL)).replace('"seed":0', '"seed":7'),
        "its settings have the key",
    ),
    "another cell's": (lambda text: text_of(record_of(OTHER)), f"it belongs to tiny/cells/{OTHER.key}.json"),
    "another sweep's": (
        lambda text: text_of(record_of(Cell("other", CELL.settings))),
        "it belongs to other/cells/",
    ),
    "a mark of failure": (
        lambda text: text_of({**record_of(CELL), "failure": "it failed"}),
        "it belongs to tiny/failures/",
    ),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_record_is_named_with_what_to_do_and_set_aside(store, case):
    change, message = CORRUPT[case]
    path = store.save(record_of(CELL))
    store.save(record_of(OTHER))
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    with pytest.raises(StoreError) as error:
        store.load(CELL)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "Move it away or delete it: its cell is run again" in str(error.value)
    contents = store.read("tiny")
    assert contents.records == {OTHER.key: record_of(OTHER)} and list(contents.damaged) == [path]
    assert message in contents.damaged[path]
    content = path.read_bytes()
    moved = store.set_aside("tiny", contents.damaged)
    assert moved == {path: store.out / "tiny" / "aside" / path.name} and moved[path].read_bytes() == content
    assert store.load(CELL) is None and store.read("tiny") == Contents({OTHER.key: record_of(OTHER)})
    assert files(store) == [f"{OTHER.key}.json"]


def test_foreign_files_are_set_aside_and_none_is_replaced_there(store):
    store.save(record_of(CELL))
    for content in ("one", "two"):
        notes = store.folder("tiny") / "notes.json"
        notes.write_text(content)
        store.set_aside("tiny", store.read("tiny").damaged)
    os.mkfifo(store.folder("tiny") / "queue.json")
    sparse = store.folder("tiny") / "sparse.json"
    with open(sparse, "wb") as file:
        file.truncate(100 * 2**30)
    damaged = store.read("tiny").damaged
    assert [(path.name, reason) for path, reason in damaged.items()] == [
        ("queue.json", "it is a FIFO, not a regular file"),
        ("sparse.json", "it has 107,374,182,400 bytes, more than the 67,108,864 that it can have"),
    ]
    assert len(store.set_aside("tiny", damaged)) == 2
    aside = store.aside("tiny")
    assert sorted(path.name for path in aside.iterdir()) == ["notes.json", "notes.json.1", "queue.json", "sparse.json"]
    assert [(aside / name).read_text() for name in ("notes.json", "notes.json.1")] == ["one", "two"]
    assert store.load(CELL) == record_of(CELL) and files(store) == [f"{CELL.key}.json"]


def test_what_another_process_is_at_or_has_replaced_is_not_set_aside(store, holder):
    path = store.save(record_of(OTHER))
    half = path.with_name(f"{CELL.key}.json")
    half.write_text("{")
    whole = path.read_bytes()
    path.write_bytes(b"{")
    damaged = store.read("tiny").damaged
    assert list(damaged) == sorted([path, half])
    path.write_bytes(whole)
    assert store.set_aside("tiny", damaged) == {} and half.read_text() == "{" and path.read_bytes() == whole


def test_what_the_first_version_wrote_is_reused(store):
    path = store.save(record_of(CELL))
    path.write_text(earlier(record_of(CELL)))
    assert store.read("tiny") == Contents({CELL.key: record_of(CELL)}, earlier=[CELL.key])
    assert store.load(CELL) == record_of(CELL)
    store.save(store.load(CELL))
    assert store.read("tiny").earlier == []


def test_a_later_format_stops_everything_and_stays(store, monkeypatch):
    path = store.path(CELL)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.runner.record.FORMAT", 3)
        assert store.save({**record_of(CELL), "format": 3}) == path
    for read in (lambda: store.read("tiny"), lambda: store.load(CELL), lambda: store.set_aside("tiny", [path])):
        with pytest.raises(StoreError, match="it has format 3, .* Nothing was changed. Update the checkout"):
            read()
    assert path.exists()


def test_a_malformed_record_is_not_saved(store):
    with pytest.raises(StoreError, match="its settings have the key"):
        store.save({**record_of(CELL), "key": OTHER.key})
    with pytest.raises(StoreError, match="its settings are those of no cell"):
        store.save({**record_of(CELL), "sweep": "../../pwn"})
    assert store.read("tiny").records == {} and not store.out.exists()


def test_a_failure_is_kept_until_the_cell_is_finished(store):
    assert store.failures("tiny") == {}
    store.save_failure(CELL, "Traceback\n  ...\nMemoryError: no")
    store.save_failure(OTHER, "x" * 100_000)
    marks = Store(store.out).failures("tiny")
    assert (
        marks[CELL.key]["failure"] == "Traceback\n  ...\nMemoryError: no"
        and marks[CELL.key]["settings"] == CELL.settings
    )
    assert marks[OTHER.key]["failure"] == "x" * 10_000
    assert store.read("tiny") == Contents() and store.load(CELL) is None
    store.save(record_of(CELL))
    assert set(store.failures("tiny")) == {OTHER.key} and set(store.read("tiny").records) == {CELL.key}


def test_a_claim_is_seen_from_outside(store, holder):
    assert store.is_claimed(CELL) and not store.is_claimed(OTHER)
    assert [path.name for path in (store.out / "tiny" / "claims").iterdir()] == [f"{CELL.key}.lock"]
    holder.kill()
    holder.wait()
    assert not store.is_claimed(CELL)


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
    assert set(store.read("tiny").records) == {CELL.key, OTHER.key}


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


def test_of_a_claim_that_has_ended_nothing_is_kept(store):
    with store.claim(CELL) as mine:
        assert mine
        store.save(record_of(CELL))
    with store.claim(OTHER):
        assert [path.stem for path in store._locks] == [OTHER.key]
    assert not store._locks


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
    assert set(store.read("tiny").records) == {OTHER.key}
    store.prepare("tiny")
    assert files(store) == sorted([half.name, f"{OTHER.key}.json"])
    holder.kill()
    holder.wait()
    store.prepare("tiny")
    assert files(store) == [f"{OTHER.key}.json"]
