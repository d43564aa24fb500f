"""Draws and means by site: what `guide.sample` and `guide.mean` say, against closed forms and calls of the guide.

That they do for every guide, family and structure of models is in `test_contract.py`.
"""

import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, ExpTransform, SoftplusTransform
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value

import pyro_avi as avi
from tests.all_guides import mostly_slow, takes
from tests.guides.test_contract import FAMILIES, GUIDES, difference_of_draws, stir

N = 7
X = torch.linspace(-2.0, 2.0, N)


# Those that take discrete latents.
DISCRETE = [kind for kind in GUIDES if takes(kind, discrete=True)]


@pytest.fixture(params=GUIDES)
def kind(request):
    return request.param


def vectors(x, index=None):
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def shared(x, index=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        rate = pyro.sample("rate", dist.LogNormal(loc, scale))
        pyro.sample("x", dist.Normal(rate, 1.0), obs=x)


def model_of(distribution):
    """A model whose rows have one latent of this distribution."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    return model


def stirred(kind, model, *args, **options):
    guide = GUIDES[kind](model, **options).setup(*args)
    stir(guide, 0.5)
    return guide


# --- draws


@pytest.mark.parametrize(
    "kind, family",
    [
        (kind, name)
        for kind in GUIDES
        for name, make in FAMILIES.items()
        if name != "Conditional" and takes(kind, family=make())
    ],
)
def test_one_draw_is_that_of_a_call(kind, family):
    guide = stirred(kind, vectors, X, family=FAMILIES[family]())
    torch.manual_seed(1)
    expected = guide(X)["z"]
    torch.manual_seed(1)
    assert torch.equal(guide.sample(X, num_samples=1)["z"][0], expected)


@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
def test_draws_are_those_of_predictive(kind):
    guide = stirred(kind, shared, X)
    expected = Predictive(guide, num_samples=300)(X)
    expected = {name: value.reshape(300, -1) for name, value in expected.items()}
    draws = guide.sample(X, num_samples=500)
    assert {name: tuple(draw.shape) for name, draw in draws.items()} == {
        "loc": (500,),
        "scale": (500,),
        "rate": (500, N),
    }
    assert difference_of_draws({name: draw.reshape(500, -1) for name, draw in draws.items()}, expected) < 6


def test_rows_of_a_minibatch_are_those_of_all(kind):
    guide, index = stirred(kind, shared, X), torch.tensor([4, 0, 5])
    whole, some = guide.mean(X), guide.mean(X[index], index)
    torch.testing.assert_close(some["rate"], whole["rate"][index])
    assert torch.equal(some["loc"], whole["loc"])
    assert guide.sample(X[index], index=index, num_samples=4)["rate"].shape == (4, 3)


def test_rows_that_the_guide_has_not_seen():
    for kind in ("ConstantGuide", "AmortizedGuide"):
        guide = stirred(kind, vectors, X)
        assert guide.sample(torch.randn(11), num_samples=5)["z"].shape == (5, 11, 3)
        assert torch.equal(guide.mean(torch.ones(2))["z"], guide.median(torch.ones(2))["z"])
    guide = stirred("FactorizedGuide", vectors, X)
    for call in (lambda x: guide.sample(x, num_samples=2), guide.mean):
        with pytest.raises(ValueError, match=r"(?s)all 7 rows.*got 11.*avi\.refine"):
            call(torch.randn(11))


def test_without_arguments_tables_and_constants_answer_for_all_rows():
    for kind in ("ConstantGuide", "FactorizedGuide"):
        guide = stirred(kind, shared, X)
        assert guide.sample(num_samples=3)["rate"].shape == (3, N)
        assert torch.equal(guide.mean()["rate"], guide.mean(X)["rate"])
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        stirred("AmortizedGuide", shared, X).mean()


def test_draws_leave_no_trace_and_go_on_in_the_random_state(kind):
    guide = stirred(kind, shared, X)
    trace = pyro.poutine.trace(lambda: guide.sample(X, num_samples=2)).get_trace()
    assert set(trace.nodes) == {"_INPUT", "_RETURN"}
    one, two = (guide.sample(X, num_samples=2)["rate"] for _ in range(2))
    assert (one != two).any()
    state = torch.get_rng_state()
    guide.mean(X)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_draws_that_is_none_is_refused(kind, number):
    guides = [stirred(kind, vectors, X), avi.MeanFieldNormal(vectors).setup(X)]
    for guide in guides:
        with pytest.raises(ValueError, match=f"num_samples of at least 1, got {number}"):
            guide.sample(X, num_samples=number)


# --- means


def integral(function):
    """The expectation of a function of a standard normal."""
    density = scipy.stats.norm.pdf
    return scipy.integrate.quad(lambda e: function(e) * density(e), -12, 12, epsabs=1e-12, limit=500, points=[0.0])[0]


class Below(dist.TransformedDistribution):
    """Numbers below 3."""

    support = constraints.less_than(3.0)


SUPPORTS = {
    "real": (dist.Normal(0.0, 1.0), 1e-6),
    "positive": (dist.LogNormal(0.0, 1.0), 1e-5),
    "above": (dist.Pareto(torch.tensor(1.0), torch.tensor(2.0)), 1e-5),
    "below": (Below(dist.Normal(0.0, 1.0), [ExpTransform(), AffineTransform(3.0, -1.0)]), 1e-5),
    "unit interval": (dist.Beta(1.0, 1.0), 1e-6),
    "interval": (dist.Uniform(-3.0, 5.0), 1e-6),
    "softplus": (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [SoftplusTransform()]), 1e-5),
}
OF_NORMALS = ["DiagonalNormal", "MultivariateNormal", "LowRankNormal", "MarkovNormal"]


@pytest.mark.parametrize("family", OF_NORMALS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_means_are_expectations(family, support):
    distribution, tolerance = SUPPORTS[support]
    model = model_of(distribution)
    guide = avi.ConstantGuide(model, family=FAMILIES[family](), init_loc_fn=init_to_value(values={"z": start(support)}))
    guide.setup(X)
    stir(guide, 0.7)
    normal = guide.posterior(X)
    transform = torch.distributions.biject_to(distribution.support)
    m, s = normal.mean[0, 0].item(), normal.variance[0, 0].sqrt().item()
    expected = integral(lambda e: transform(torch.tensor(m + s * e, dtype=torch.double)).item())
    mean = guide.mean(X)["z"]
    assert s > 0.03
    torch.testing.assert_close(mean, torch.full((N,), expected), rtol=tolerance, atol=tolerance)
    # It is another number than the median, but for a symmetric latent.
    assert ((mean - guide.median(X)["z"]).abs() > 2 * tolerance).all() or support == "real"


def start(support):
    return torch.full((N,), {"above": 2.0, "unit interval": 0.2}.get(support, 0.5))


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 30.0])
def test_quadrature_is_exact_for_any_width(scale):
    """For a probability: E[1 / (1 + exp(-u))] of a normal u, against adaptive quadrature over u."""
    guide = avi.ConstantGuide(model_of(dist.Beta(1.0, 1.0))).double().setup(X.double())
    with torch.no_grad():
        guide.vector[:] = torch.tensor([1.5, scale]).double()
        guide.vector[1].log_()
    expected = scipy.integrate.quad(
        lambda u: scipy.stats.norm.pdf(u, 1.5, scale) * scipy.special.expit(u),
        1.5 - 10 * scale,
        1.5 + 10 * scale,
        points=[-5.0, 0.0, 5.0],
        epsabs=1e-13,
        limit=1000,
    )[0]
    assert guide.mean(X.double())["z"][0].item() == pytest.approx(expected, abs=1e-4 if scale > 5 else 1e-9)


def test_the_mean_of_a_wide_log_normal_is_exact():
    # Of 1,000 draws the average would be a fraction of it.
    guide = avi.ConstantGuide(model_of(dist.LogNormal(0.0, 1.0))).double().setup(X.double())
    with torch.no_grad():
        guide.vector[:] = torch.tensor([1.0, 6.0]).double().log()
    assert guide.mean(X.double())["z"][0].item() == pytest.approx(torch.tensor(18.0).double().exp().item())


def test_other_means_are_those_of_draws(kind):
    simplex = model_of(dist.Dirichlet(torch.ones(3)))
    guide = stirred(kind, simplex, X)
    mean, draws = guide.mean(X)["z"], guide.sample(X, num_samples=20_000)["z"]
    error = draws.std(0) / 1000**0.5
    assert ((mean - draws.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(mean.sum(-1), torch.ones(N))
    assert torch.equal(mean, guide.mean(X)["z"])


def mixture(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(y + z.sum(-1), 1.0), obs=x)


@pytest.mark.parametrize("kind", DISCRETE)
def test_the_mean_over_values_of_a_discrete_latent_is_exact(kind):
    guide = stirred(kind, mixture, X, family=avi.Conditional(avi.DiagonalNormal()))
    with torch.no_grad():
        table = guide.variational_parameters(X)
    members, logits = table[:, :12].unflatten(-1, (3, 4)), table[:, 12:]
    means = (members[..., :2] + (2 * members[..., 2:]).exp() / 2).exp()
    probs = logits.softmax(-1)
    mean = guide.mean(X)
    torch.testing.assert_close(mean["z"], (probs[..., None] * means).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean["y"], probs @ torch.arange(3.0))


@pytest.mark.parametrize("kind", DISCRETE)
def test_a_discrete_latent_that_the_call_observes_decides_the_member(kind):
    def semi(x, y=None):
        with pyro.plate("data", len(x)):
            label = pyro.sample("y", dist.Categorical(torch.ones(3)), obs=y)
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(label + z, 1.0), obs=x)

    guide = stirred(kind, semi, X, family=avi.Conditional(avi.DiagonalNormal()))
    labels = torch.arange(N) % 3
    table = guide.variational_parameters(X).detach()[:, :6].unflatten(-1, (3, 2))
    mean, draws = guide.mean(X, labels), guide.sample(X, labels, num_samples=2000)
    assert list(mean) == list(draws) == ["z"]
    torch.testing.assert_close(mean["z"], table[torch.arange(N), labels, 0])
    error = draws["z"].std(0) / 2000**0.5
    assert ((draws["z"].mean(0) - mean["z"]).abs() < 5 * error).all()


# --- the global latents


def test_the_factor_of_the_globals_answers_by_itself():
    guide = avi.MeanFieldNormal(shared, init_scale=0.5).setup(X)
    stir(guide, 0.5)
    draws, mean = guide.sample(X, num_samples=4000), guide.mean(X)
    assert {name: tuple(draw.shape) for name, draw in draws.items()} == {
        "loc": (4000,),
        "scale": (4000,),
        "rate": (4000, N),
    }
    for name, draw in draws.items():
        assert ((draw.mean(0) - mean[name]).abs() < 5 * draw.std(0) / 4000**0.5).all()
    torch.manual_seed(1)
    expected = guide(X)["rate"]
    torch.manual_seed(1)
    assert guide.sample(X, num_samples=1)["rate"].shape == (1, *expected.shape)


class ByHand(pyro.nn.PyroModule):
    def forward(self, *args, **kwargs):
        pyro.sample("scale", dist.LogNormal(0.3, 0.2))
        pyro.sample("loc", dist.Normal(2.0, 0.1))


GLOBAL_GUIDES = {
    "joint": AutoMultivariateNormal,
    "point": lambda model: AutoDelta(model),
    "by hand": lambda model: ByHand(),
}


@pytest.mark.parametrize("kind", mostly_slow(GUIDES))
@pytest.mark.parametrize("name", GLOBAL_GUIDES)
def test_the_globals_may_have_any_guide(kind, name):
    if kind == "SemiAmortizedGuide" and name == "by hand":
        with pytest.raises(ValueError, match="guide of the global latents that knows its median"):
            GUIDES[kind](shared, global_guide=GLOBAL_GUIDES[name]).setup(X)
        return
    guide = GUIDES[kind](shared, global_guide=GLOBAL_GUIDES[name]).setup(X)
    draws, mean = guide.sample(X, num_samples=50), guide.mean(X)
    assert list(draws) == list(mean) == ["loc", "scale", "rate"]
    assert draws["loc"].shape == draws["scale"].shape == (50,) and mean["loc"].shape == ()
    assert (draws["scale"] > 0).all()
    for site in ("loc", "scale"):
        error = draws[site].std() * (1 / 50 + 1 / 1000) ** 0.5 + 1e-5
        assert (draws[site].mean() - mean[site]).abs() < 5 * error
    if name == "by hand":
        assert mean["loc"].item() == pytest.approx(2.0, abs=5 * 0.1 / 1000**0.5)


def test_a_global_latent_that_the_call_observes_is_left_out(kind):
    def model(x, loc=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0), obs=loc)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = stirred(kind, model, X)
    assert list(guide.sample(X, torch.tensor(1.0), num_samples=2)) == ["z"]
    assert list(guide.mean(X, torch.tensor(1.0))) == ["z"] and list(guide.mean(X)) == ["loc", "z"]
