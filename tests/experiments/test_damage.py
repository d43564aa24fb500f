"""Data files, records and command lines with damage of every kind: what is promised is raised, or nothing has changed."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import sweep
from experiments.datasets import DatasetError, load
from experiments.runner.record import DamagedError, NewerFormatError, decode, encode
from experiments.runner.store import Store
from tests.damage import EXAMPLES, damaged, search
from tests.experiments.runner.test_record import CELL, RECORD, as_format_1
from tests.experiments.test_datasets import files_of, published

__all__ = ["published"]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_data_file_is_refused_or_the_same(published, examples):
    name, root, train, test = published
    paths = [root / file.path for file in files_of(name)]
    whole = {path: path.read_bytes() for path in paths}

    def check(damage):
        at, content = damage
        paths[at].write_bytes(content)
        try:
            images = load(name, data_dir=root)
        except DatasetError as error:
            assert str(paths[at]) in str(error)
        else:
            assert len(images.train) == len(train) and len(images.test) == len(test)
            assert np.array_equal((images.train * 255).round().byte().numpy(), train)
        paths[at].write_bytes(whole[paths[at]])

    each = [st.tuples(st.just(at), damaged(whole[path], whole[paths[0]])) for at, path in enumerate(paths)]
    search(check, st.one_of(each), examples=examples // len(names_of_published()))


def names_of_published():
    return ("cifar10", "fashionmnist", "mnist", "svhn")


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_record_is_refused_or_the_same(examples):
    other = {**RECORD, "result": {"value": 2.0}}

    def check(damage):
        try:
            found, _ = decode(damage)
        except (DamagedError, NewerFormatError):
            return
        assert found == RECORD or damage == encode(other)

    search(check, damaged(encode(RECORD), encode(other)), examples=examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_record_without_a_checksum_is_refused_or_a_record(tmp_path, examples):
    store = Store(tmp_path)
    path = store.path(CELL)
    path.parent.mkdir(parents=True)

    def check(damage):
        path.write_bytes(damage)
        contents = store.read(CELL.sweep)
        assert list(contents.damaged) == [path] or contents.records[CELL.key]["settings"] == CELL.settings

    # Not what a later version wrote, which stops a sweep: by two digits, or one that was another.
    strategy = damaged(as_format_1(RECORD), encode(RECORD)).filter(lambda damage: not is_newer(damage))
    search(check, strategy, examples=examples)


def is_newer(damage):
    try:
        decode(damage)
    except NewerFormatError:
        return True
    except DamagedError:
        pass
    return False


WORDS = ["--kinds", "plain", "plain,fail", "--tuned", "--jobs", "2", "0", "-1", "10" * 30, "--engine", "serial", "ray"]
WORDS += ["processes", "--address", "127.0.0.1:1", "--device", "cpu", "cuda", "auto", "--download", "--yes", "--list"]
WORDS += [
    "--status",
    "--verify",
    "--prune",
    "--dry-run",
    "--help",
    "--",
    "-",
    "",
    "tiny",
    "images",
    "../../pwn",
    "\0",
    "é",
    "%s",
]


@pytest.mark.parametrize("examples", EXAMPLES)
def test_no_command_line_ends_in_a_traceback(tiny, tmp_path, examples):
    out = tmp_path / "results"

    def check(words):
        # Last, so that nothing runs.
        arguments = ["tiny", *words, "--out", str(out), "--dry-run"]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = sweep.main(arguments)
            except SystemExit as stop:
                code = stop.code
        assert code in (0, 1, 2) and said.getvalue() and "Traceback" not in said.getvalue()
        assert not out.exists()

    words = st.sampled_from(WORDS) | st.text(max_size=5)
    search(check, st.lists(words, max_size=6), examples=examples)
