"""Rows drawn without a permutation of all: a shuffle's first swaps, uniform over ordered subsets, at any number of rows."""

import itertools
import math
import random
import warnings
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_avi as avi
from pyro_avi.rows import uniform_subsample as rows
from pyro_avi.rows.uniform_subsample import draw_rows, first_swaps
from tests.marks import needs_compiler


def shuffled(size, numbers):
    """The first rows of a shuffle in Python whose swaps are told by these numbers."""
    order = list(range(size))
    for i, number in enumerate(numbers):
        j = i + number % (size - i)
        order[i], order[j] = order[j], order[i]
    return order[: len(numbers)]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (2, 2), (7, 7), (9, 4), (40, 33), (300, 256)])
def test_it_is_a_shuffle_that_holds_what_it_touches(size, count, monkeypatch):
    for _ in range(30):
        numbers = torch.randint(2**62, (count,))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda *args, numbers=numbers, **kwargs: numbers)
            assert first_swaps(size, count).tolist() == shuffled(size, numbers.tolist())


def test_moves_are_followed_however_long_their_chain(monkeypatch):
    # Step i moves the row at position i to i + 1, so that row 0 comes last.
    count = 100
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.ones(count, dtype=torch.long))

    assert first_swaps(200, count).tolist() == list(range(1, count + 1))
    numbers = torch.tensor([1] * (count - 1) + [0])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: numbers)
    assert first_swaps(200, count).tolist() == [*range(1, count), 0]


def excess(draw, size=5, count=3, draws=6000):
    """How many of its standard deviations the chi-square statistic of ordered subsets lies above its mean."""
    seen = Counter(tuple(draw(size, count)) for _ in range(draws))
    kinds = list(itertools.permutations(range(size), count))
    expected = draws / len(kinds)
    statistic = sum((seen[kind] - expected) ** 2 / expected for kind in kinds)
    return (statistic - (len(kinds) - 1)) / math.sqrt(2 * (len(kinds) - 1))


def test_every_order_of_every_subset_is_equally_likely():
    assert abs(excess(lambda size, count: first_swaps(size, count).tolist())) < 5


def test_chi_square_finds_other_draws():
    generator = random.Random(0)

    def swapped_with_any(size, count):
        order = list(range(size))
        for i in range(count):
            j = generator.randrange(size)
            order[i], order[j] = order[j], order[i]
        return order[:count]

    def spaced(size, count):
        drawn = sorted(generator.randrange(size - count + 1) for _ in range(count))
        return generator.sample([row + i for i, row in enumerate(drawn)], count)

    assert excess(swapped_with_any) > 20 and excess(spaced) > 20
    assert abs(excess(lambda size, count: generator.sample(range(size), count))) < 5


@pytest.mark.parametrize(("size", "count"), [(12, 5), (10**4, 1000), (10**5, 10**4), (10**12, 64)])
def test_rows_are_different_and_of_the_plate_and_the_seeds(size, count):
    # A permutation of 10^12 rows would take 8 TB.
    found = draw_rows(size, count)

    assert found.shape == (count,) and found.dtype == torch.long
    assert len(found.unique()) == count and found.min() >= 0 and found.max() < size
    torch.manual_seed(0)
    assert torch.equal(draw_rows(size, count), found)
    assert not torch.equal(draw_rows(size, count), found)


def test_a_trace_of_a_draw_draws_as_it_does():
    """Nothing in it depends on what is drawn: a graph of one draw is a graph of all."""
    graph = make_fx(lambda: first_swaps(20, 15))()

    for seed in range(50):
        torch.manual_seed(seed)
        drawn = first_swaps(20, 15)
        torch.manual_seed(seed)
        assert torch.equal(graph(), drawn)


def test_guide_and_model_share_rows_of_a_large_plate():
    size, count = 50_000, 4
    x = torch.arange(float(size))

    def model(x):
        with pyro.plate("data", size, subsample_size=count) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(count), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    guide = avi.FactorizedGuide(model).setup(x)
    seen = []
    for _ in range(3):
        of_guide = poutine.trace(guide).get_trace(x)
        of_model = poutine.trace(poutine.replay(model, of_guide)).get_trace(x)
        index = of_guide.nodes["data"]["value"]
        assert torch.equal(of_model.nodes["x"]["value"], x[index]) and len(index.unique()) == count
        assert of_model.nodes["x"]["scale"] == size / count
        seen.append(index)
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("size", [100, 50_000])
def test_compiled_steps_draw_the_rows_of_eager_ones(size):
    x = torch.linspace(-1, 1, size, dtype=torch.double)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros((), dtype=torch.double))

        def forward(self, x):
            with pyro.plate("data", size, subsample_size=7) as index:
                z = pyro.sample("z", dist.Normal(self.loc, 1.0).expand([7]))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def train(compile):
        model = Model()
        guide = avi.FactorizedGuide(model)
        losses = avi.fit(model, guide, x, num_steps=6, lr=0.1, compile=compile, progress=False).losses
        return losses, guide.table.detach()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, compiled = train(False), train(True)
    torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)
    assert (eager[1] != eager[1].mode(0).values).any(-1).sum() > 7


def test_few_rows_are_drawn_as_pyro_draws_them():
    drawn = draw_rows(30, 7)
    torch.manual_seed(0)
    assert torch.equal(drawn, pyro.plate("data", 30, subsample_size=7).indices)
    assert rows.UniformSubsample(30, 7, 1, torch.device("cpu"), drawn).sample() is drawn
