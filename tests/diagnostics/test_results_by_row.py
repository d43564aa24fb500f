"""Results by row on disk: those of all rows at once, gone on with after an interruption."""

import errno
import os

import numpy as np
import pytest
import torch

import pyro_avi as avi

N, B = 50, 8
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))


def moments(x, index):
    return {"mean": x.mean(1), "square": x[:, :2].double() ** 2, "row": index}


def batches(seed=0):
    return avi.minibatches(X, batch_size=B, seed=seed)


def test_every_row_has_its_own_result(tmp_path):
    found = avi.results_by_row(moments, batches(), size=N, out=tmp_path)

    expected = moments(X, torch.arange(N))
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert isinstance(rows, np.memmap) and np.array_equal(rows, expected[name].numpy())
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), rows)


def test_work_that_was_interrupted_goes_on(tmp_path):
    calls = []

    def function(x, index):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(index)
        return {**moments(x, index), "call": torch.full((len(x),), len(calls))}

    with pytest.raises(KeyboardInterrupt):
        avi.results_by_row(function, batches(), size=N, out=tmp_path)
    first = torch.cat(calls)
    calls = []

    found = avi.results_by_row(function, iter(list(_take(batches(), 7))), size=N, out=tmp_path)

    # The first four batches are passed over. The last one has some of their rows again, whose results stay.
    assert len(calls) == 3 and set(first.tolist()) & set(calls[-1].tolist())
    assert np.array_equal(found["call"][first.numpy()], np.repeat([1, 2, 3, 4], B))
    assert sorted(found["call"]) == sorted([1, 2, 3, 4] * B + [1, 2] * B + [3, 3])
    assert np.array_equal(found["mean"], X.mean(1).numpy())
    # Nothing is left to do.
    again = avi.results_by_row(function, iter(()), size=N, out=tmp_path)
    assert len(calls) == 3 and np.array_equal(again["row"], np.arange(N))


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_refined_rows_are_those_of_the_batches(tmp_path):
    model = avi.models.VAE(avi.models.DenseDecoder(2, (4,), (3,)), size=N)
    x = torch.rand(N, 3, generator=torch.Generator().manual_seed(1))
    guide = avi.AmortizedGuide(model, encoder=(4,)).setup(x)

    def refine(x, index):
        return {"table": avi.refine(model, guide, x, num_steps=2, progress=False).table}

    found = avi.results_by_row(refine, avi.minibatches(x, batch_size=20), size=N, out=tmp_path)["table"]

    seen = set()
    for x_batch, index in _take(avi.minibatches(x, batch_size=20), 3):
        new = [row not in seen for row in index.tolist()]
        assert np.array_equal(found[index.numpy()][new], refine(x_batch, index)["table"].detach().numpy()[new])
        seen.update(index.tolist())
    assert len(seen) == N


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (moments, [(X[:B], torch.arange(B))], "Expected batches with all 50 rows, got none with 42"),
        (moments, [(X,)], "Expected batches whose last part are the positions"),
        (moments, [(X[:1], torch.tensor([N]))], "Expected positions from 0 to 49, got 50 to 50"),
        (lambda x, index: {"total": x.sum()}, [(X, torch.arange(N))], "Expected 'total' of the 50 rows of the batch"),
        (
            lambda x, index: {"../up": x},
            [(X, torch.arange(N))],
            "Expected names of results that are plain words, got '../up'",
        ),
        (
            lambda x, index: {"a" if index[0] else "b": x},
            [(X[:1], torch.tensor([0])), (X[:1], torch.tensor([1]))],
            r"Expected the results \['b'\] of every batch, got \['a'\]",
        ),
        (
            lambda x, index: {"a": x[:, : 1 + int(index[0])]},
            [(X[:1], torch.tensor([0])), (X[:1], torch.tensor([1]))],
            r"Expected 'a' as float32 of shape \[B, 1\], like other batches, got float32 of shape \[B, 2\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(function, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        avi.results_by_row(function, given, size=N, out=tmp_path)


def test_results_of_something_else_are_refused(tmp_path):
    avi.results_by_row(moments, batches(), size=N, out=tmp_path)
    with pytest.raises(ValueError, match=r"Expected results of shape \(51,\) and type bool at .*, got \(50,\)"):
        avi.results_by_row(moments, batches(), size=N + 1, out=tmp_path)


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def no_space(file, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(
        ValueError, match="Expected a folder with room for the results at .*, got: No space left on device"
    ):
        avi.results_by_row(moments, batches(), size=N, out=tmp_path)
