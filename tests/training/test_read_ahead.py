"""Arrays on disk: batches are those of arrays in memory, and only their rows are read."""

import os

import numpy as np
import pytest
import torch

import pyro_avi as avi
from pyro_avi.rows import mapped_file

N, B = 1000, 64
X = np.random.default_rng(0).normal(size=(N, 3, 2))


@pytest.fixture
def on_disk(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("share", [0.1, 0.0])
def test_batches_are_those_of_an_array_in_memory(share, on_disk, monkeypatch):
    monkeypatch.setattr(mapped_file, "_SHARE", share)
    label = np.arange(N, dtype=np.int32)
    disk, memory = (avi.minibatches(x, label, batch_size=B) for x in (on_disk, X))

    for _ in range(40):
        for one, other in zip(next(disk), next(memory), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    disk.skip(21)
    memory.skip(21)
    assert torch.equal(next(disk)[0], next(memory)[0])


def test_the_array_stays_on_disk(on_disk):
    batches = avi.minibatches(on_disk, batch_size=B)

    (rows,) = batches._tensors
    assert rows.data_ptr() == on_disk.ctypes.data and next(batches)[0].dtype == torch.float32


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="asks the system")
def test_the_rows_of_the_next_batch_are_asked_for(on_disk, monkeypatch):
    # As of a file that memory is too small for.
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *where: asked.append(where))
    batches = avi.minibatches(on_disk, batch_size=B)

    first = next(batches)[-1]
    expected = [(on_disk.offset + 48 * row, 48, os.POSIX_FADV_WILLNEED) for row in first.tolist()]
    assert asked[:B] == expected
    ahead = [where[0] for where in asked[B:]]

    assert ahead == [on_disk.offset + 48 * row for row in next(batches)[-1].tolist()]


def test_parts_of_mapped_arrays_are_read_as_they_are(on_disk, monkeypatch):
    monkeypatch.setattr(mapped_file, "_SHARE", 0.0)

    x, index = next(avi.minibatches(on_disk[100:], batch_size=B))

    assert torch.equal(x, torch.from_numpy(X[100:])[index].float())
