"""Arrays on disk: batches are those of arrays in memory, and only their rows are read, by threads that leave nothing behind."""

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_avi as avi
from pyro_avi.rows import mapped_file
from pyro_avi.training.read_ahead import RowReader
from tests.training import test_resume as resume

N, B = 1000, 64
X = np.random.default_rng(0).normal(size=(N, 3, 2))


@pytest.fixture
def on_disk(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.fixture
def large(on_disk, monkeypatch):
    """An array that memory is too small for."""
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    return on_disk


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pyro_avi rows")]


def check_equal(one, other):
    assert len(one) == len(other)
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.parametrize("share", [0.1, 0.0])
@pytest.mark.parametrize("seed", [0, None])
def test_batches_are_those_of_an_array_in_memory(share, seed, on_disk, monkeypatch):
    monkeypatch.setattr(mapped_file, "_SHARE", share)
    label, states, made = np.arange(N, dtype=np.int32), [], []
    for x in (on_disk, X):
        torch.manual_seed(3)
        batches = avi.minibatches(x, label, batch_size=B, seed=seed)
        made.append([next(batches) for _ in range(40)])
        # Within what is being read, and far beyond it.
        for count in (3, 0, 100):
            batches.skip(count)
            made[-1].append(next(batches))
        states.append(torch.get_rng_state())

    for disk, memory in zip(*made, strict=True):
        check_equal(disk, memory)
    assert torch.equal(*states)


def test_the_array_stays_on_disk(on_disk):
    batches = avi.minibatches(on_disk, batch_size=B)

    (rows,) = batches._reader._tensors
    assert rows.data_ptr() == on_disk.ctypes.data and next(batches)[0].dtype == torch.float32


def test_arrays_in_memory_and_small_ones_have_no_threads(on_disk, monkeypatch):
    before, batches = set(readers()), [avi.minibatches(x, batch_size=B) for x in (on_disk, X, torch.from_numpy(X))]
    # Not mapped any more, whatever its class is.
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    batches.append(avi.minibatches(on_disk + 1, batch_size=B))

    for each in batches:
        next(each)
        assert each._reader.ahead == 0 and len(each._coming) == 0
    assert set(readers()) <= before


def test_batches_to_come_are_read_meanwhile_and_not_without_bound(large, monkeypatch):
    begun, begin = [], RowReader.begin
    monkeypatch.setattr(RowReader, "begin", lambda self, index: begun.append(index) or begin(self, index))
    batches, taken = avi.minibatches(large, batch_size=B), []

    for count in range(1, 100):
        taken.append(next(batches)[-1])
        assert 16 < len(begun) - count + 1 <= 33
        assert len(readers()) <= 32
    # In their order, also beyond the end of an epoch.
    assert all(map(torch.equal, taken, begun))


def test_rows_that_are_large_are_not_read_far_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float16, shape=(100, 2**20))

    # Twice as many bytes as torch's default type.
    assert [avi.minibatches(x, batch_size=size)._reader.ahead for size in (1, 2, 4, 100)] == [16, 8, 4, 2]


def test_what_reading_raises_is_raised_where_the_rows_are_asked_for(large):
    x = torch.from_numpy(np.array(large))
    reader = RowReader((large,), (x,), (torch.float64,), B)

    wrong, right = reader.begin(torch.tensor([0, N])), reader.begin(torch.tensor([0, N - 1]))

    with pytest.raises(IndexError, match="index out of range"):
        wrong()
    assert torch.equal(right()[0], x[[0, N - 1]])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_nothing_is_left_when_batches_are_not_needed_any_more(large):
    # Of other tests.
    gc.collect()
    for thread in readers():
        thread.join(10)
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        batches = avi.minibatches(large, batch_size=B)
        next(batches)
        started = readers()
        assert started
        del batches
        gc.collect()
        for thread in started:
            thread.join(10)
        assert not readers()
    assert len(os.listdir("/proc/self/fd")) == files


ENDS_AT_ONCE = """
import numpy as np, pyro_avi as avi
from pyro_avi.rows import mapped_file
mapped_file._SHARE = 0.0
batches = avi.minibatches(np.load({path!r}, mmap_mode="r"), batch_size=64)
next(batches)
{end}
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "code"), [("", 0), ("raise KeyboardInterrupt", -signal.SIGINT)])
def test_programs_end_while_batches_are_read(end, code, large):
    program = ENDS_AT_ONCE.format(path=str(large.filename), end=end)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)

    assert ended.returncode == code and ("Traceback" in ended.stderr) == ("Keyboard" in end), ended.stderr


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda batches: pickle.loads(pickle.dumps(batches))])
def test_copies_go_on_from_the_same_batch(copied, large):
    batches = avi.minibatches(large, batch_size=B)
    next(batches)

    check_equal(next(copied(batches)), next(batches))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_batches_go_on_in_a_process_that_was_forked(large):
    batches, expected = (avi.minibatches(x, batch_size=B) for x in (large, X))
    for _ in range(5):
        next(batches), next(expected)
    with warnings.catch_warnings():
        # Python 3.12 says that threads do not go on, which is what is tried.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        failed = True
        try:
            signal.alarm(60)
            for _ in range(40):
                check_equal(next(batches), next(expected))
            failed = False
        except BaseException:
            # Nobody else says why: this process ends without pytest.
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    check_equal(next(batches), next(expected))


def test_parts_of_mapped_arrays_are_read_ahead_too(large):
    batches = avi.minibatches(large[100:, 1], batch_size=B)

    x, index = next(batches)
    assert torch.equal(x, torch.from_numpy(X[100:, 1])[index].float()) and readers()


def test_a_training_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    x = resume.X.float().numpy()
    np.save(tmp_path / "x.npy", x)

    def train(x, stop_after=None, **options):
        def stop(fit):
            if fit.steps == stop_after:
                raise KeyboardInterrupt

        pair = [part.float() for part in resume.build()]
        fit = resume.train(
            pair, 40, batches=avi.minibatches(x, batch_size=5, seed=1), callbacks=[stop], progress=False, **options
        )
        return fit.losses, resume.state(pair)

    expected, state = train(x)
    with pytest.raises(KeyboardInterrupt):
        train(np.load(tmp_path / "x.npy", mmap_mode="r"), 27, checkpoint=tmp_path / "training", every=10)
    losses, found = train(np.load(tmp_path / "x.npy", mmap_mode="r"), checkpoint=tmp_path / "training", every=10)

    assert torch.equal(losses, expected) and resume.same(found, state)
