"""Answers for a loader's batches, put together by the rows that they are about."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from tests.all_guides import GUIDES

N, M, K = 7, 3, 2
X = torch.linspace(-2, 2, N * M).reshape(N, M)
LOADER = [torch.tensor([4, 0, 6]), torch.tensor([1, 5]), torch.tensor([2, 3, 4])]


def nested(x, index=None):
    with pyro.plate("outer", N, subsample=index, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1, K), 1.0).to_event(1))
        with pyro.plate("inner", M, dim=-1):
            w = pyro.sample("w", dist.LogNormal(z[..., 0], 1.0))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)


def crossed(x, index=None):
    persons, items = pyro.plate("persons", N, subsample=index, dim=-2), pyro.plate("items", M, dim=-1)
    with persons:
        ability = pyro.sample("ability", dist.Normal(torch.zeros(1), 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(torch.zeros(K), 1.0).to_event(1))
    with persons, items:
        pyro.sample("x", dist.Normal(ability - difficulty.sum(-1), 1.0), obs=x)


def series(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(M), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


MODELS = {
    "nested": (nested, ("outer", "inner"), {"z": (N, 1, K), "w": (N, M)}),
    "crossed": (crossed, ("persons", "items"), {"ability": (N, 1), "difficulty": (M, K)}),
}


@torch.no_grad()
def stirred(guide, *args):
    guide.setup(*args)
    torch.manual_seed(0)
    for parameter in guide.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("batches", [[(X,)], [(X[index], index) for index in LOADER]])
def test_the_answer_is_put_together_where_it_is_asked_for(batches):
    guide = stirred(avi.ConstantGuide(nested, plate=("outer", "inner")), X)
    # A device that has no values to bring back.
    answer = guide.posterior_by_row(batches, device="meta")
    assert {(site, value.device.type, tuple(value.shape)) for site, value in answer.items()} == {
        ("z", "meta", (N, 1, K)),
        ("w", "meta", (N, M)),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["constant", "factorized"])
def test_batches_of_several_row_sets_give_what_one_call_gives(kind, name):
    model, plates, shapes = MODELS[name]
    guide = stirred(GUIDES[kind](model, plate=plates), X)
    whole = guide.posterior_by_row([(X,)])

    by_batch = guide.posterior_by_row([(X[index], index) for index in LOADER])

    assert {site: tuple(value.shape) for site, value in by_batch.items()} == shapes
    medians = guide.median(X)
    for site, value in by_batch.items():
        torch.testing.assert_close(value, whole[site], rtol=0.2, atol=0.2)
        if site != "w":
            assert torch.equal(value, medians[site])
    draws = guide.posterior_by_row([(X[index], index) for index in LOADER], num_samples=5)
    assert {site: tuple(value.shape) for site, value in draws.items()} == {
        s: (5, *shape) for s, shape in shapes.items()
    }


def test_amortized_rows_are_those_of_their_batch():
    guide = stirred(avi.AmortizedGuide(nested, (4,), plate=("outer", "inner")), X)
    by_batch = guide.posterior_by_row([(X[index], index) for index in LOADER], sites=["z"])
    assert list(by_batch) == ["z"]
    torch.testing.assert_close(by_batch["z"], guide.median(X)["z"])


@pytest.mark.parametrize("kind", ["constant", "amortized"])
def test_batches_without_positions_follow_one_another(kind):
    guide = stirred(GUIDES[kind](series), X)
    together = guide.posterior_by_row([(X[:3],), (X[3:],)])
    torch.testing.assert_close(together["z"], guide.median(X)["z"])


def test_it_stops_when_every_row_was_seen():
    def endless():
        while True:
            for index in LOADER:
                yield X[index], index

    guide = stirred(avi.FactorizedGuide(nested, plate=("outer", "inner")), X)
    assert guide.posterior_by_row(endless())["w"].shape == (N, M)


REFUSED = {
    "no batch": (lambda g: g.posterior_by_row([]), "at least one batch, got none"),
    "no local latent": (lambda g: g.posterior_by_row([(X,)], sites=["x"]), r"local latents \['z', 'w'\], got \['x'\]"),
    "missing rows": (
        lambda g: g.posterior_by_row([(X[index], index) for index in LOADER[:2]]),
        "all 21 rows of plates 'outer' x 'inner', got none with 6|all 7 rows of plate 'outer', got none with 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(stirred(avi.FactorizedGuide(nested, plate=("outer", "inner")), X))
