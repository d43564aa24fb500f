"""Which rows own which factors of a log joint: exact sums, and twins that the checks find."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_avi as avi
from pyro_avi.densities import attribution, dependence
from pyro_avi.densities.attribution import Owners, attribute
from pyro_avi.densities.dependence import find_rows, row_codes
from pyro_avi.densities.kept import Kept
from pyro_avi.evaluation_mode import evaluation_mode

GROUPS = torch.tensor([0, 3, 1, 1, 0, 3, 3, 2])
X = torch.linspace(-2.0, 3.0, 8, dtype=torch.float64)


def normal():
    return dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)


# --- on arrays


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100, 1000])
def test_no_code_covers_another(count):
    codes = row_codes(count)
    assert len(codes) == count and len(codes.unique(dim=0)) == count
    assert len(codes.sum(1).unique()) == 1


@pytest.mark.parametrize("count", [2, 5, 33])
def test_rows_are_found_from_what_changes(count):
    # Which rows each number depends on: none, each alone, pairs, all.
    sets = [[], *[[n] for n in range(count)], [0, count - 1], list(range(count))]
    series = [row_codes(count), torch.eye(count, dtype=torch.bool)]
    changes = [torch.stack([code[rows].any(0) for rows in sets], 1) for code in series]
    rows, ties = find_rows(series, changes)
    assert rows.tolist() == [-1, *range(count), 0, 0]
    assert sorted(map(len, ties)) == sorted({2, count})


def test_very_many_sets_of_rows_are_taken_for_one(monkeypatch):
    monkeypatch.setattr(dependence, "_MOST_SETS", 3)
    codes = row_codes(9)
    pairs = torch.stack([codes[n] | codes[n + 1] for n in range(4)], 1)
    rows, ties = find_rows([codes], [torch.cat([pairs, codes.T], 1)])
    assert rows.tolist() == [0] * 4 + list(range(9)) and [len(tied) for tied in ties] == [9]


# --- on models


def in_groups(x, group, size=4):
    with pyro.plate("groups", size):
        z = pyro.sample("z", normal())
    with pyro.plate("observations", len(x)):
        pyro.sample("x", dist.Normal(z[..., group], 0.5), obs=x)


def chain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal())
        before = torch.cat([torch.zeros_like(z[..., :1]), z[..., :-1]], -1)
        pyro.sample("x", dist.Normal(z + before, 0.5), obs=x)


def in_pairs(x):
    with pyro.plate("data", 8):
        z = pyro.sample("z", normal())
    with pyro.plate("matches", 4):
        pyro.sample("x", dist.Normal(z[..., :4] - z[..., 4:], 0.5), obs=x[:4])


def crossed(x):
    a, b = pyro.plate("a", 4, dim=-2), pyro.plate("b", 2, dim=-1)
    with a:
        z = pyro.sample("z", normal())
    with b:
        w = pyro.sample("w", normal())
    with a, b:
        pyro.sample("x", dist.Normal(z * w, 0.5), obs=x.reshape(4, 2))


def nested(x):
    with pyro.plate("outer", 4, dim=-2):
        z = pyro.sample("z", normal())
        with pyro.plate("inner", 2, dim=-1):
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x.reshape(4, 2))


CALLS = {
    "groups": (in_groups, (X, GROUPS), ("groups",), [[0, 1, 2, 3]]),
    "chain": (chain, (X,), ("data",), [[0] * 8]),
    "pairs": (in_pairs, (X,), ("data",), [[0, 1, 2, 3, 0, 1, 2, 3]]),
    "crossed": (crossed, (X,), ("a", "b"), [[0] * 4, [0] * 2]),
    "nested": (nested, (X,), ("outer", "inner"), [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3]]),
    "nested, rows of the outer plate": (nested, (X,), ("outer",), [[0, 1, 2, 3]]),
    "one row": (chain, (X,), (), [[0]]),
}


@pytest.mark.parametrize("call", CALLS)
def test_rows_that_something_ties_are_one_block(call):
    model, args, plates, expected = CALLS[call]
    found = attribute(model, None, args, {}, plates)
    assert [blocks.tolist() for blocks in found.blocks.values()] == expected
    assert found.by_row == (len(expected) == 1 and expected[0] == list(range(len(expected[0]))))
    assert bool(found.ties) == (found.num_blocks < sum(map(len, expected)))


def test_a_row_owns_its_observations_in_another_plate():
    guide = avi.FactorizedGuide(in_groups, plate="groups", init_scale=1.0)
    weights = avi.log_weights(in_groups, guide, X, GROUPS, num_samples=5)
    assert weights.local.shape == (5, 4) and weights.blocks is None and not weights.global_.any()
    torch.manual_seed(1)
    local = avi.log_weights(in_groups, guide, X, GROUPS, num_samples=1, seed=1).local[0]
    torch.manual_seed(1)
    z = poutine.trace(guide).get_trace(X, GROUPS).nodes["z"]["value"]
    expected = normal().log_prob(z) - guide.posterior(X, GROUPS).log_prob(z.unsqueeze(-1))
    expected = expected.index_add(0, GROUPS, dist.Normal(z[GROUPS], 0.5).log_prob(X))
    torch.testing.assert_close(local, expected, rtol=0.0, atol=1e-12)


def test_a_part_of_the_observations_is_no_evidence():
    def model(x, group):
        with pyro.plate("groups", 4):
            z = pyro.sample("z", normal())
        with pyro.plate("observations", 80, subsample=torch.arange(8)):
            pyro.sample("x", dist.Normal(z[..., group], 0.5), obs=x)

    weights = avi.log_weights(model, avi.ConstantGuide(model, plate="groups"), X, GROUPS, num_samples=3)
    assert weights.is_estimate and math.isfinite(avi.elbo(weights).value)
    with pytest.raises(ValueError, match="all of their observations, got those of a part"):
        avi.iwelbo(weights)


# --- enumerated latents


def mixture(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7]).double()), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(torch.tensor([-2.0, 1.0]).double()[k], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_enumerated_latents_are_summed_out_row_by_row():
    guide = avi.FactorizedGuide(mixture, init_scale=1.0)
    torch.manual_seed(1)
    weights = avi.log_weights(mixture, guide, X, num_samples=1, seed=1)
    torch.manual_seed(1)
    z = poutine.trace(guide).get_trace(X).nodes["z"]["value"]
    prior = torch.logsumexp(
        torch.tensor([0.3, 0.7]).double().log()
        + dist.Normal(torch.tensor([-2.0, 1.0]).double(), 1.0).log_prob(z[:, None]),
        1,
    )
    expected = prior + dist.Normal(z, 0.5).log_prob(X) - guide.posterior(X).log_prob(z.unsqueeze(-1))
    torch.testing.assert_close(weights.local[0], expected, rtol=0.0, atol=1e-12)


def test_draws_of_enumerated_latents_follow_their_posterior():
    guide = avi.FactorizedGuide(mixture, init_scale=0.01)
    posterior = avi.to_arviz(mixture, guide, X, num_samples=1000)["posterior"]
    z = torch.from_numpy(posterior["z"].values[0])
    logits = torch.tensor([0.3, 0.7]).double().log() + dist.Normal(torch.tensor([-2.0, 1.0]).double(), 1.0).log_prob(
        z[..., None]
    )
    share, drawn = logits.softmax(-1)[..., 1].mean(0), torch.from_numpy(posterior["k"].values[0]).double().mean(0)
    error = (share * (1 - share) / 1000).sqrt()
    # Resolved; and a twin, the prior's share.
    assert error.max() < 0.016 and ((drawn - share).abs() < 5 * error + 1e-3).all()
    assert ((drawn - 0.7).abs() > 5 * error).any()


# --- twins: what is wrong is found


@pytest.fixture
def nothing_kept(monkeypatch):
    """No answer of an earlier test is at hand."""
    monkeypatch.setattr(attribution, "_KEPT", Kept())


def shifted(owners):
    return Owners(torch.where(owners.blocks < 0, -1, (owners.blocks + 1) % owners._count), owners._count)


def none(owners):
    return Owners(torch.full_like(owners.blocks, -1), owners._count)


@pytest.mark.parametrize("wrong", [shifted, none])
@pytest.mark.parametrize("site", [0, 1])
@pytest.mark.parametrize("call", ["groups", "pairs", "nested", "nested, rows of the outer plate"])
def test_a_site_of_other_rows_is_named(monkeypatch, nothing_kept, call, site, wrong):
    model, args, plates, _ = CALLS[call]
    find = attribution._find

    def find_wrong(of_call):
        found = find(of_call)
        owners = list(found.owners[0])
        owners[site] = wrong(owners[site])
        return replace(found, owners=(owners, found.owners[1]))

    monkeypatch.setattr(attribution, "_find", find_wrong)
    with pytest.raises(ValueError, match="depend on no other rows' latents, got others at"):
        attribute(model, None, args, {}, plates)


def test_a_site_left_out_is_named(monkeypatch, nothing_kept):
    from pyro_avi.densities import perturbation

    factors = perturbation.log_factors
    monkeypatch.setattr(perturbation, "log_factors", lambda trace, **options: factors(trace, **options)[:1])
    with pytest.raises(ValueError, match=r"add up to the log joint, got another sum at sites \['x'\]"):
        attribute(in_groups, None, (X, GROUPS), {}, ("groups",))


# --- modules


def test_modules_are_measured_in_evaluation_mode():
    norm, dropout = nn.BatchNorm1d(2), nn.Dropout(0.5)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dropout(norm(z)), 1.0).to_event(1), obs=x)

    x = torch.randn(8, 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    guide = avi.ConstantGuide(model).setup(x)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(avi.log_weights(model, guide, x, num_samples=2, seed=3).local)
    avi.measure_gaps(model, guide, x, num_samples=30, num_steps=2, max_rounds=1)
    avi.ais(model, guide, x, num_chains=2, num_temperatures=2, num_leapfrog=1)
    avi.sbc(model, guide, x, num_simulations=1, num_samples=20)
    avi.to_arviz(model, guide, x, num_samples=2)
    torch.testing.assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.training and dropout.training


def test_modes_are_given_back_after_an_error():
    module = nn.Sequential(nn.Dropout(0.5))
    with pytest.raises(KeyError), evaluation_mode():
        assert torch.equal(module(torch.ones(9)), torch.ones(9))
        raise KeyError
    assert module.training and module[0].training
