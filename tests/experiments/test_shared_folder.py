"""What the processes of a sweep share: data sets read once on a machine, and nothing left behind."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from experiments import datasets
from experiments.shared_folder import SHARED, shared_folder, sharing

OWN = Path(__file__).parent / "own_datasets"
# As datasets.load reads it, without torch, which takes seconds to import.
READ = """
import json, sys
from pathlib import Path
from experiments import datasets
datasets.__path__.append(sys.argv[1])
from experiments.datasets import counted
from experiments.datasets._once import read_once
root = Path(sys.argv[2])
pixels = read_once(lambda: counted.read(root, download=False), "counted", str(root))
print(json.dumps([pixels.train.tolist(), pixels.test.tolist(), pixels.maximum]))
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The temporary files of these tests, and no folder that others share."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(SHARED, raising=False)
    return folder


def read_in_processes(root, count):
    """What so many processes at once are given, and how often the files were read."""
    command = [sys.executable, "-c", READ, str(OWN), str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    given = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    return given, (root / "reads").read_text().count("read")


def test_processes_that_share_a_folder_read_a_data_set_once(tmp_path, temporary):
    alone, reads = read_in_processes(tmp_path, 3)
    assert reads == 3
    (tmp_path / "reads").unlink()
    with sharing():
        together, reads = read_in_processes(tmp_path, 3)
        assert reads == 1 and len(list(temporary.iterdir())) == 1
    assert set(together) == set(alone) and len(set(alone)) == 1
    assert not list(temporary.iterdir())


def test_what_is_shared_is_the_data_set_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(OWN)])
    alone = datasets.load("counted", data_dir=tmp_path, num_train=3)
    with sharing():
        for _ in range(2):
            shared = datasets.load("counted", data_dir=tmp_path, num_train=3)
            assert shared.train.equal(alone.train) and shared.test.equal(alone.test)
        # Of another folder it is another one.
        (tmp_path / "other").mkdir()
        datasets.load("counted", data_dir=tmp_path / "other")
    assert (tmp_path / "reads").read_text().count("read") == 2
    assert (tmp_path / "other" / "reads").read_text().count("read") == 1


def test_a_damaged_or_half_kept_data_set_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(OWN)])
    with sharing():
        first = datasets.load("counted", data_dir=tmp_path)
        for damage in (Path.unlink, lambda path: os.truncate(path, 5), lambda path: os.truncate(path, 0)):
            damage(sorted(shared_folder().glob("*.npy"))[0])
            assert datasets.load("counted", data_dir=tmp_path).train.equal(first.train)
    assert (tmp_path / "reads").read_text().count("read") == 4


def test_without_a_usable_folder_every_process_reads(tmp_path, temporary, monkeypatch):
    assert shared_folder() is None
    # Of another machine, and one that others can write to.
    open_to_all = temporary / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for folder in (tmp_path / "nowhere" / "folder", open_to_all):
        monkeypatch.setenv(SHARED, str(folder))
        assert shared_folder() is None
        assert read_in_processes(tmp_path, 2)[1] == 2
        (tmp_path / "reads").unlink()


def test_folders_of_killed_processes_go_when_the_next_one_is_made(temporary, monkeypatch):
    left, used = (temporary / f"pyro_avi_shared_{name}" for name in ("left", "used"))
    for folder in (left, used):
        folder.mkdir(mode=0o700)
        (folder / "data").write_text("x")
    monkeypatch.setenv(SHARED, str(used))
    assert shared_folder() == used
    monkeypatch.delenv(SHARED)
    with sharing():
        made = shared_folder()
        assert not left.exists() and (used / "data").exists() and made.exists()
    assert not made.exists()
