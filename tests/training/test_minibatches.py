"""Minibatches: of one size, every row once in each epoch, each batch as likely as any other, in an order by the seed."""

import collections
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

import pyro_avi as avi
from pyro_avi.optimization import step
from pyro_avi.rows.shard import Shard
from pyro_avi.training import minibatches as module
from tests.marks import needs_compiler
from tests.training.test_fit_many import make

# (rows, rows a batch): that divide, do not, and are more than half of all, all, or more.
SIZES = [(12, 4), (11, 4), (7, 5), (9, 8), (5, 5), (5, 8), (1, 3), (6, 1)]
# (rows, rows a batch, processes)
SHARES = [(12, 6, 3), (12, 4, 3), (23, 8, 2), (23, 3, 2), (50, 11, 4), (11, 11, 5), (7, 9, 3), (6, 6, 6)]


def positions(rows, batch_size, **options):
    return (index for _, index in avi.minibatches(torch.arange(float(rows)), batch_size=batch_size, **options))


def taken(batches, count):
    return list(itertools.islice(batches, count))


def permutations(monkeypatch, orders):
    """Have these drawn, one after another."""
    drawn = iter(orders)
    monkeypatch.setattr(torch, "randperm", lambda count, **options: torch.tensor(next(drawn)))


def of_process(monkeypatch, rank, count):
    """Have batches made as in one of several processes."""
    ranks = SimpleNamespace(shard=Shard(rank, count), seed=lambda seed: seed)
    monkeypatch.setattr(module, "Ranks", lambda distributed: ranks)


# --- rows


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_every_batch_has_all_its_rows_and_every_epoch_every_row_once(rows, batch_size):
    x, y = torch.arange(float(rows)), torch.arange(2 * rows).view(rows, 2)
    batches = taken(avi.minibatches(x, y, batch_size=batch_size), 3 * rows)
    size = min(rows, batch_size)
    for a, b, index in batches:
        assert len(index) == size == len(index.unique())
        assert torch.equal(a, x[index]) and torch.equal(b, y[index])
    epochs = torch.cat([index for *_, index in batches]).split(rows)
    assert len(epochs) == 3 * size
    assert all(epoch.sort().values.equal(torch.arange(rows)) for epoch in epochs)
    assert rows < 5 or len(set(map(tuple, map(torch.Tensor.tolist, epochs)))) > 1


def test_rows_that_are_left_are_joined_by_the_first_ones_of_the_next_epoch_that_are_others(monkeypatch):
    permutations(monkeypatch, [[0, 1, 2, 3, 4], [3, 0, 4, 1, 2], [0, 1, 2, 3, 4]])
    found = [index.tolist() for index in taken(positions(5, 3), 4)]
    assert found[:2] == [[0, 1, 2], [3, 4, 0]]
    # The rows passed over are still to come, and so it goes on.
    assert sorted(found[2]) == [1, 3, 4] and found[3] == [2, 0, 1]


@pytest.mark.parametrize(("rows", "batch_size"), SIZES)
def test_epochs_that_keep_their_last_batch_are_permutations_cut(rows, batch_size):
    generator = torch.Generator().manual_seed(4)
    expected = [part for _ in range(4) for part in torch.randperm(rows, generator=generator).split(batch_size)]
    found = taken(positions(rows, batch_size, last_batch="keep", seed=4), len(expected))
    assert all(map(torch.equal, found, expected))
    # Where batches divide the rows nothing is left.
    same = taken(positions(rows, batch_size, seed=4), len(expected))
    assert all(map(torch.equal, found, same)) == (rows % min(batch_size, rows) == 0)


@pytest.mark.parametrize("last_batch", ["rollover", "keep"])
def test_rows_are_permuted_once_an_epoch(last_batch, monkeypatch):
    drawn, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: drawn.append(args) or randperm(*args, **options))
    seen = sum(map(len, taken(positions(11, 4, last_batch=last_batch), 30)))
    assert drawn == [(11,)] * -(-seen // 11)


# --- chances


def losses_and_counts(monkeypatch, rows, batch_size, steps, *, orders, **options):
    """By step the losses of all ways to permute the rows, and how often each batch was drawn."""
    values = torch.tensor([1.0, -2.0, 5.0, 0.5, 3.0], dtype=torch.double)[:rows]
    losses, counts = [[] for _ in range(steps)], [collections.Counter() for _ in range(steps)]
    for way in orders:
        permutations(monkeypatch, way)
        for at, index in enumerate(taken(positions(rows, batch_size, **options), steps)):
            counts[at][frozenset(index.tolist())] += 1
            losses[at].append(rows / len(index) * values[index].sum())
    return values, [torch.stack(own) for own in losses], counts


def variance(values, batch_size):
    """That of the sum estimated by so many different rows: N^2 / B (1 - B / N) S^2."""
    rows = len(values)
    return rows**2 / batch_size * (1 - batch_size / rows) * values.var()


@pytest.mark.parametrize(("rows", "batch_size", "epochs", "steps"), [(3, 2, 3, 4), (4, 3, 2, 2), (5, 3, 2, 3)])
def test_every_batch_is_as_likely_as_any_other_and_its_gradient_unbiased(rows, batch_size, epochs, steps, monkeypatch):
    every = list(itertools.permutations(range(rows)))
    # Of five rows there are very many orders. In what order a batch has its rows does not matter.
    first = every if rows < 5 else [way for way in every if way[0] < way[1] < way[2] and way[3] < way[4]]
    orders = itertools.product(first, *[every] * (epochs - 1))
    values, losses, counts = losses_and_counts(monkeypatch, rows, batch_size, steps, orders=orders)
    batches = set(map(frozenset, itertools.combinations(range(rows), batch_size)))
    for loss, count in zip(losses, counts, strict=True):
        assert set(count) == batches and len(set(count.values())) == 1
        torch.testing.assert_close(loss.mean(), values.sum(), rtol=1e-12, atol=0.0)
        torch.testing.assert_close(loss.var(correction=0), variance(values, batch_size), rtol=1e-12, atol=0.0)


def test_twins_that_do_not_shuffle_or_keep_the_last_batch_are_seen(monkeypatch):
    every = list(itertools.permutations(range(3)))
    values, losses, counts = losses_and_counts(monkeypatch, 3, 2, 2, orders=[(way, (0, 1, 2)) for way in every])
    assert len(set(counts[0].values())) == 1 < len(set(counts[1].values()))
    assert (losses[1].mean() - values.sum()).abs() > 1
    # Unbiased, but of one row.
    _, losses, _ = losses_and_counts(monkeypatch, 3, 2, 2, orders=zip(every), last_batch="keep")
    torch.testing.assert_close(losses[1].mean(), values.sum())
    torch.testing.assert_close(losses[1].var(correction=0), variance(values, 1))
    assert variance(values, 1) > 3 * variance(values, 2)


# --- order


@pytest.mark.parametrize("last_batch", ["rollover", "keep"])
def test_the_order_is_decided_by_the_seed_alone(last_batch):
    def order(seed):
        return [index.tolist() for index in taken(positions(30, 7, last_batch=last_batch, seed=seed), 9)]

    before = torch.get_rng_state()
    one = order(0)
    torch.rand(3)
    assert one == order(0) != order(1)
    torch.set_rng_state(before)
    order(0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("process", [None, (0, 2), (1, 2)])
@pytest.mark.parametrize("last_batch", ["rollover", "keep"])
@pytest.mark.parametrize(("rows", "batch_size"), [(12, 4), (11, 4), (7, 5), (12, 11), (5, 8)])
def test_batches_that_are_passed_over_are_not_made(rows, batch_size, last_batch, process, monkeypatch):
    if process is not None:
        of_process(monkeypatch, *process)
    x = torch.arange(rows)
    expected = taken(avi.minibatches(x, batch_size=batch_size, last_batch=last_batch), 40)
    for start in range(20):
        passing = avi.minibatches(x, batch_size=batch_size, last_batch=last_batch)
        next(passing)
        passing.skip(start)
        # A copy goes on by itself.
        for batches in (copy.deepcopy(passing), passing):
            for one, other in zip(taken(batches, 10), expected[start + 1 :], strict=False):
                assert all(map(torch.equal, one, other))


def test_passing_over_takes_no_time_for_each_batch(monkeypatch):
    batches, made = avi.minibatches(torch.arange(100_003), batch_size=2), []
    index = module._Positions.__next__
    monkeypatch.setattr(module._Positions, "__next__", lambda self: made.append(None) or index(self))
    batches.skip(500_000)
    assert len(made) == -(-1_000_000 // 100_003)


# --- several processes


@pytest.mark.parametrize(("rows", "batch_size", "processes"), SHARES)
def test_shares_are_those_of_the_rows_and_differ_by_one(rows, batch_size, processes):
    shards, size = [Shard(rank, processes) for rank in range(processes)], min(rows, batch_size)
    shares = torch.tensor([[shard.share(size * step, rows) for step in range(rows + 1)] for shard in shards])
    assert (shares.sum(0) == size * torch.arange(rows + 1)).all()
    # After N batches every row was in B of them.
    assert shares[:, -1].tolist() == [size * len(shard.rows(rows)) for shard in shards]
    each = shares.diff()
    for own, shard in zip(each, shards, strict=True):
        exact = size * len(shard.rows(rows)) / rows
        assert ((own - exact).abs() < 1).all()
    if rows % processes == size % processes == 0:
        assert (each == size // processes).all()


@pytest.mark.parametrize(("rows", "batch_size", "processes"), SHARES)
def test_each_process_takes_its_rows_once_an_epoch(rows, batch_size, processes, monkeypatch):
    batches = []
    for rank in range(processes):
        of_process(monkeypatch, rank, processes)
        own = taken(positions(rows, batch_size), 3 * rows)
        for epoch in torch.cat(own).split(len(Shard(rank, processes).rows(rows))):
            assert epoch.sort().values.equal(Shard(rank, processes).rows(rows))
        batches.append(own)
    for shares in zip(*batches, strict=True):
        assert min(map(len, shares)) > 0
        assert len(torch.cat(shares).unique()) == sum(map(len, shares)) == min(rows, batch_size)


@pytest.mark.parametrize(("rows", "batch_size", "processes"), SHARES)
def test_processes_that_keep_last_batches_end_epochs_together(rows, batch_size, processes, monkeypatch):
    steps = -(-rows // batch_size)
    for rank in range(processes):
        of_process(monkeypatch, rank, processes)
        own, shard = taken(positions(rows, batch_size, last_batch="keep"), 3 * steps), Shard(rank, processes)
        for epoch in range(3):
            found = own[epoch * steps : (epoch + 1) * steps]
            assert torch.cat(found).sort().values.equal(shard.rows(rows))
            assert [len(index) for index in found] == [len(part) for part in shard.rows(rows).tensor_split(steps)]


# --- trainings


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "last_batch", "graphs"), [(False, "rollover", 1), (False, "keep", 2), (True, "rollover", 1)]
)
def test_a_training_has_one_graph(together, last_batch, graphs, monkeypatch, caplog):
    # Every shape would have a graph, in however short a training.
    monkeypatch.setattr(step, "_COST_OF_A_SHAPE", 0.0)
    counted, count_work = [], step.count_work
    monkeypatch.setattr(step, "count_work", lambda *args: counted.append(args) or count_work(*args))
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    batches = [avi.minibatches(x, batch_size=5, last_batch=last_batch) for _ in range(2)]
    pairs, options = [make(seed) for seed in (0, 1)], {"num_steps": 13, "progress": False}
    with caplog.at_level("INFO", logger="pyro_avi"):
        if together:
            avi.fit_many(pairs, batches=batches, **options)
        else:
            avi.fit(*pairs[0], batches=batches[0], compile=True, **options)
    what = "The training step of all replicas" if together else "The training step"
    assert [(record.what, record.fallback) for record in caplog.records] == graphs * [(what, None)]
    # Whether another graph would pay is not asked where there is no other shape.
    assert len(counted) == graphs - 1


# --- errors


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((), {}, r"one and the same number of rows, at least 1, got \[\]"),
        ((torch.zeros(3), torch.zeros(4)), {}, r"got \[3, 4\]"),
        ((torch.zeros(0, 2),), {}, r"at least 1, got \[0\]"),
        ((torch.zeros(3),), {"batch_size": 0}, "batch_size of at least 1, got 0"),
        ((torch.zeros(3),), {"last_batch": "drop"}, "last_batch to be 'rollover' or 'keep', got 'drop'"),
    ],
)
def test_minibatches_of_nothing_are_refused(tensors, options, message):
    # At the call, not at the first batch.
    with pytest.raises(ValueError, match=message):
        avi.minibatches(*tensors, **{"batch_size": 3, **options})


@pytest.mark.parametrize(("rows", "batch_size", "processes"), [(23, 2, 2), (10, 2, 3)])
def test_a_process_without_rows_in_a_batch_is_refused(rows, batch_size, processes, monkeypatch):
    of_process(monkeypatch, processes - 1, processes)
    with pytest.raises(ValueError, match=f"a row for each of them in every batch, got {batch_size} of {rows} rows"):
        positions(rows, batch_size)


@pytest.mark.parametrize("last_batch", ["rollover", "keep"])
@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (12, 4), (3, 5), (7, 7)])
def test_positions_ahead_are_those_of_the_next_batches(size, batch_size, last_batch):
    x = torch.arange(float(size))
    one, many = (avi.minibatches(x, batch_size=batch_size, last_batch=last_batch, seed=3) for _ in range(2))
    assert many.rows is not None and many.rows[0] is x
    expected, found = [], []
    for most in (1, 5, 2, 30, 3):
        positions = many.positions_ahead(most)
        # Where the next batch has another size there are none, and it is taken by itself.
        assert positions.shape[1] == many.batch_size == min(size, batch_size) and len(positions) <= most
        found += [*positions, next(many)[-1]]
        expected += [next(one)[-1] for _ in range(len(positions) + 1)]
        assert last_batch == "keep" or len(positions) == most
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    many.skip(3)
    one.skip(3)
    assert torch.equal(many.positions_ahead(1)[0] if last_batch == "rollover" else next(many)[-1], next(one)[-1])


def test_rows_are_given_as_they_are_where_a_batch_is_a_copy_of_them():
    x = torch.rand(6, 4)
    assert avi.minibatches(x, batch_size=2).rows[0] is x
    assert avi.minibatches(x, x.T.contiguous().T, batch_size=2).rows is None
