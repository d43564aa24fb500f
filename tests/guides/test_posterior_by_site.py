"""Posteriors by site: their densities are those that the guide is traced with, and their draws those of the guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_avi as avi
from tests.all_guides import SMALL_GUIDES, takes
from tests.guides.test_contract import FAMILIES, stir

N = 5
X = torch.linspace(-1.0, 1.0, N)

SINGLE = {
    "real vector": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "positive vector": lambda: dist.LogNormal(torch.zeros(3), 1.0).to_event(1),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "positive number": lambda: dist.LogNormal(0.0, 1.0),
    "share": lambda: dist.Beta(2.0, 2.0),
}


def model_with(latent):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent())
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


def several(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3) / 3))
        rate = pyro.sample("rate", dist.LogNormal(loc, scale.sum()))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(rate + z.sum(-1) + kind, 1.0), obs=x)


def stirred(kind, model, **options):
    guide = SMALL_GUIDES[kind](model, **options).setup(X)
    stir(guide, 0.5)
    return guide


def traced(guide):
    trace = poutine.trace(guide).get_trace(X)
    trace.compute_log_prob()
    return trace


@pytest.mark.parametrize("latent", SINGLE)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Conditional"])
def test_the_density_of_a_single_site_is_that_of_the_guide(family, latent):
    guide = stirred("FactorizedGuide", model_with(SINGLE[latent]), family=FAMILIES[family]())
    trace = traced(guide)
    value = trace.nodes["z"]["value"]
    by_site = guide.posterior_by_site(X)["z"]
    assert (*by_site.batch_shape, *by_site.event_shape) == value.shape
    assert by_site.sample().shape == value.shape and by_site.sample((2, 3)).shape == (2, 3, *value.shape)
    has_formula = value.dim() == 2 or guide.family.marginals(guide.table) is not None
    if not has_formula:
        with pytest.raises(NotImplementedError, match=r"a marginal of a joint one.*\n.*guide\.posterior"):
            by_site.log_prob(value)
        return
    # With its auxiliary site, whose density the site's own completes.
    expected = sum(node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample")
    torch.testing.assert_close(by_site.log_prob(value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in SMALL_GUIDES if takes(kind, discrete=True)])
def test_every_latent_of_independent_factors_has_its_own_density(kind):
    guide = stirred(kind, several)
    trace, by_site = traced(guide), guide.posterior_by_site(X)
    assert list(by_site) == ["loc", "scale", "kind", "rate", "z"]
    for name, site in by_site.items():
        density = site.log_prob(trace.nodes[name]["value"].detach())
        torch.testing.assert_close(density, trace.nodes[name]["log_prob"].detach())
        assert not density.requires_grad
    # Not in unconstrained coordinates.
    assert (by_site["rate"].sample((50,)) > 0).all() and (by_site["scale"].sample((50,)) > 0).all()


@pytest.mark.parametrize("family", ["MultivariateNormal", "Flow", "Conditional"])
def test_shares_of_a_joint_factor_have_the_draws_of_the_guide(family):
    guide = stirred("FactorizedGuide", several, family=FAMILIES[family]())
    by_site = guide.posterior_by_site(X)
    # A scalar with a normal marginal has a density, and draws of its own.
    for name in ("z",) if family == "MultivariateNormal" else ("rate", "z"):
        torch.manual_seed(3)
        draws = by_site[name].sample((4,))
        torch.manual_seed(3)
        expected = guide.row_factors[0].factor.draw(guide.variational_parameters(X), 4)[name]
        assert torch.equal(draws, expected)


def test_a_global_guide_of_ones_own_is_known_by_its_draws():
    guide = stirred("ConstantGuide", several, global_guide=AutoMultivariateNormal)
    by_site = guide.posterior_by_site(X)
    assert by_site["scale"].event_shape == (2,) and by_site["loc"].event_shape == ()
    draws = by_site["scale"].sample((6,))
    assert draws.shape == (6, 2) and (draws > 0).all() and draws.std(0).min() > 0


def test_what_a_call_observes_is_no_latent_of_it():
    def model(x, rate=None):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0), obs=rate)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z * rate, 1.0), obs=x)

    guide = avi.ConstantGuide(model).setup(X)
    assert list(guide.posterior_by_site(X)) == ["rate", "z"]
    assert list(guide.posterior_by_site(X, X.exp())) == ["z"]
