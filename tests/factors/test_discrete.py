"""Discrete latents, labels of some rows and mixtures: log weights against sums and integrals over the whole support."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

import pyro_avi as avi
from pyro_avi.densities.log_weights import Weigher

ROWS = 4
X = torch.linspace(-1.0, 2.5, ROWS).double()
LOCS = torch.tensor([-1.0, 0.5, 2.0]).double()
PRIOR = torch.tensor([0.2, 0.3, 0.5]).double()
LABELS, KNOWN = torch.tensor([0, 1, 2, 0]), torch.tensor([True, False, True, False])
GUIDES = [avi.ConstantGuide, avi.AmortizedGuide, avi.FactorizedGuide]


@pytest.fixture(autouse=True)
def double_and_seeded():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def one_hot(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(PRIOR))
        pyro.sample("x", dist.Normal(y @ LOCS, 0.7), obs=x)


def straight_through(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategoricalStraightThrough(PRIOR.expand(2, 3)).to_event(1))
        pyro.sample("x", dist.Normal((y @ LOCS).sum(-1), 0.7), obs=x)


def binary(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(PRIOR).to_event(1))
        pyro.sample("x", dist.Normal(y @ LOCS, 0.7), obs=x)


def labelled(x, label, known):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(PRIOR), obs=label, obs_mask=known)
        pyro.sample("x", dist.Normal(LOCS[y], 0.7), obs=x)


def split(x, label, known):
    """The same by hand."""
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=known):
            pyro.sample("y_observed", dist.Categorical(PRIOR), obs=label)
        with poutine.mask(mask=~known):
            y = pyro.sample("y_unobserved", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Normal(LOCS[torch.where(known, label, y)], 0.7), obs=x)


def evidence(values, log_prior, known=None):
    """``log p(x_n)`` by hand: a sum over all values, or that of the label."""
    terms = log_prior + dist.Normal(values, 0.7).log_prob(X[:, None])
    if known is None:
        return terms.logsumexp(-1)
    return torch.where(known, terms.gather(-1, LABELS[:, None]).squeeze(-1), terms.logsumexp(-1))


SWITCHES = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
PAIRS = torch.cartesian_prod(torch.arange(3), torch.arange(3))
HOT = torch.eye(3).double()
OF_LABELS = evidence(LOCS, PRIOR.log(), KNOWN)

# The model, its arguments, the site, its support and the evidence of every row.
SUMS = {
    "one-hot": (one_hot, (X,), "y", HOT, evidence(LOCS, PRIOR.log())),
    "two one-hot vectors": (
        straight_through,
        (X,),
        "y",
        HOT[PAIRS],
        evidence(LOCS[PAIRS].sum(-1), PRIOR.log()[PAIRS].sum(-1)),
    ),
    "binary vector": (
        binary,
        (X,),
        "y",
        SWITCHES,
        evidence(SWITCHES @ LOCS, dist.Bernoulli(PRIOR).log_prob(SWITCHES).sum(-1)),
    ),
    "obs_mask": (labelled, (X, LABELS, KNOWN), "y_unobserved", torch.arange(3), OF_LABELS),
    "poutine.mask": (split, (X, LABELS, KNOWN), "y_unobserved", torch.arange(3), OF_LABELS),
}


def stirred(guide):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter))
    return guide


def weights_at(model, guide, args, site, values):
    """The log weight of every row at values ``[C]`` of a site, ``[C, N]``, and the guide's log probability of them."""
    weigher = Weigher(model, guide, args, {})
    log_w, log_q = [], []
    for value in values:
        value = value.expand(ROWS, *value.shape)
        given = Trace()
        given.add_node(site, type="sample", is_observed=False, value=value, infer={})
        guide_trace = poutine.trace(poutine.replay(guide, trace=given)).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
        log_w.append(weigher.weigh(model_trace, guide_trace)[0])
        log_q.append(guide_trace.nodes[site]["fn"].log_prob(value))
    return torch.stack(log_w), torch.stack(log_q)


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("name", SUMS)
@torch.no_grad()
def test_weights_add_up_to_the_evidence_over_the_support(make, name):
    model, args, site, support, expected = SUMS[name]
    guide = stirred(make(model).setup(*args))

    log_w, log_q = weights_at(model, guide, args, site, support)

    torch.testing.assert_close(log_q.logsumexp(0), torch.zeros(ROWS))
    torch.testing.assert_close((log_w + log_q).logsumexp(0), expected)
    # Rows whose label is known have no say in it.
    spread = log_w.std(0)
    assert (spread[KNOWN] < 1e-9).all() if "mask" in name else (spread > 0.1).all()
    assert (spread[~KNOWN] > 0.1).all()


@pytest.mark.parametrize("name", SUMS)
@torch.no_grad()
def test_answers_about_discrete_latents(name):
    model, args, site, support, _ = SUMS[name]
    guide = stirred(avi.FactorizedGuide(model).setup(*args))
    _, log_q = weights_at(model, guide, args, site, support)
    mean = torch.einsum("yn,y...->n...", log_q.exp(), support.double())

    by_row = guide.posterior_by_row([args])[site]
    draws = guide.posterior_by_row([args], num_samples=4000)[site].double()
    median, quantiles = guide.median(*args)[site], guide.quantiles([0.01, 0.5, 0.99], *args)[site]

    torch.testing.assert_close(by_row, mean)
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / 4000**0.5 + 1e-12).all()
    assert torch.equal(quantiles[1], median)
    for value in (median, *quantiles):
        assert (support.reshape(len(support), -1) == value.reshape(ROWS, 1, -1)).all(-1).any(-1).all()


@torch.no_grad()
def test_the_quantile_of_a_one_hot_vector_is_that_of_its_position():
    guide = avi.ConstantGuide(one_hot).setup(X)
    guide.vector.copy_(torch.tensor([0.2, 0.45, 0.35]).log())

    positions = guide.quantiles([0.1, 0.5, 0.9], X)["y"].argmax(-1)

    assert positions[:, 0].tolist() == [0, 1, 2]


# --- mixtures


def two_peaks(x):
    with pyro.plate("data", len(x)):
        weights = dist.Categorical(torch.tensor([0.3, 0.7]))
        z = pyro.sample("z", dist.MixtureSameFamily(weights, dist.Normal(torch.tensor([-1.0, 1.0]), 0.4)))
        pyro.sample("x", dist.Normal(z, 0.7), obs=x)


def two_rates(x):
    with pyro.plate("data", len(x)):
        weights = dist.Categorical(torch.tensor([0.3, 0.7]))
        z = pyro.sample("z", dist.MixtureSameFamily(weights, dist.LogNormal(torch.tensor([-1.0, 1.0]), 0.4)))
        pyro.sample("x", dist.Normal(z.log(), 0.7), obs=x)


@pytest.mark.parametrize("model", [two_peaks, two_rates])
@torch.no_grad()
def test_weights_integrate_to_the_evidence_of_a_mixture(model):
    guide = avi.FactorizedGuide(model, init_scale=1.0).setup(X)
    grid = torch.linspace(-6.0, 6.0, 121)
    points = grid if model is two_peaks else grid.exp()

    log_w, log_q = weights_at(model, guide, (X,), "z", points)

    width = (0.1 * (torch.ones(len(points)) if model is two_peaks else points)).log()[:, None]
    # Of normal components with normal noise, and of their exponentials with that of logarithms, in closed form.
    locs, variance = torch.tensor([-1.0, 1.0]), 0.4**2 + 0.7**2
    mixed = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(locs, variance**0.5))
    torch.testing.assert_close((log_w + log_q + width).logsumexp(0), mixed.log_prob(X), rtol=0, atol=1e-6)
    torch.testing.assert_close((log_q + width).logsumexp(0), torch.zeros(ROWS), rtol=0, atol=1e-6)


def test_a_mixture_of_different_supports_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            components = dist.Uniform(torch.zeros(2), torch.tensor([1.0, 2.0]))
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"(?s)latent 'z' with one support for all components.*pyro\.deterministic"):
        avi.ConstantGuide(model).setup(X)
