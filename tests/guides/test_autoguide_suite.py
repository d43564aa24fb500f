"""What Pyro asks of every automatic guide: models of all kinds, its losses, lists of guides, predictions, copies, files."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_mean, init_to_median, init_to_sample
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import nn
from torch.distributions import constraints

import pyro_avi as avi

pytestmark = pytest.mark.filterwarnings("ignore:.*every latent is global:UserWarning")

GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": lambda model, **options: avi.AmortizedGuide(model, (4,), **options),
    "factorized": avi.FactorizedGuide,
    "constant, full covariance": lambda model, **options: avi.ConstantGuide(
        model, family=avi.MultivariateNormal(), **options
    ),
    "globals alone": lambda model, create_plates=None, **options: avi.MeanFieldNormal(model, **options),
}
ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": lambda **options: TraceEnum_ELBO(strict_enumeration_warning=False, **options),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
}


@pytest.fixture(params=GUIDES)
def make(request):
    return GUIDES[request.param]


@pytest.fixture(params=ELBOS)
def elbo(request):
    return ELBOS[request.param]


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()


# --- models without observations


def kinds_of_sites():
    pyro.sample("number", dist.Normal(0.0, 1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    with pyro.plate("plate", 3):
        pyro.sample("in plate", dist.Normal(torch.zeros(3), torch.ones(3)))
    pyro.sample("joint", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("masked", dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0).to_event(1))


@pytest.mark.parametrize("init", [init_to_feasible, init_to_mean, init_to_median, init_to_sample])
def test_sites_of_all_kinds(make, elbo, init):
    guide = make(kinds_of_sites, init_loc_fn=init)
    assert torch.tensor(elbo().loss(kinds_of_sites, guide)).isfinite()

    of_guide = poutine.trace(guide).get_trace()
    of_model = poutine.trace(poutine.replay(kinds_of_sites, of_guide)).get_trace()
    check_model_guide_match(of_model, of_guide)
    for name, site in of_model.nodes.items():
        if site["type"] == "sample" and not pyro.poutine.util.site_is_subsample(site):
            assert of_guide.nodes[name]["value"].shape == site["value"].shape


def test_factors_count_once(make, elbo):
    def model(log_factor):
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("outside", log_factor)
        with pyro.plate("plate", 3):
            pyro.factor("inside", log_factor)
            pyro.sample("z2", dist.Normal(torch.zeros(3), torch.ones(3)))

    guide = make(model)
    elbo().loss(model, guide, torch.tensor(0.0))
    losses = []
    for value in (5.0, 4.0):
        pyro.set_rng_seed(1)
        losses.append(elbo().loss(model, guide, torch.tensor(value)))
    assert losses[0] - losses[1] == pytest.approx(-1 - 3, abs=1e-4)


def skewed():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0))


def trained(make, model, elbo, steps=150, lr=0.05, **options):
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr, "betas": (0.8, 0.99)}), elbo(**options))
    for _ in range(steps):
        svi.step()
    return guide


@pytest.mark.parametrize(
    "elbo", ["Trace_ELBO", *(pytest.param(name, marks=pytest.mark.slow) for name in list(ELBOS)[1:])]
)
def test_median_and_quantiles_of_a_prior(make, elbo):
    guide = trained(make, skewed, ELBOS[elbo], num_particles=50, vectorize_particles=True, max_plate_nesting=0)
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    for name, expected in {"x": 0.0, "y": 1.0, "z": 0.5}.items():
        assert median[name].item() == pytest.approx(expected, abs=0.12)
        assert torch.equal(quantiles[name][1], median[name])
        assert (quantiles[name].diff() > 0).all()
    # Those of the prior, for the first two of which the family is exact.
    assert quantiles["x"][2].item() == pytest.approx(1.2816, abs=0.25)
    assert quantiles["y"][2].log().item() == pytest.approx(1.2816, abs=0.25)


def test_initial_values(make):
    inits = {"x": torch.tensor(0.7), "y": torch.tensor(1.3), "z": torch.tensor(0.2)}
    guide = make(skewed, init_loc_fn=lambda site: inits[site["name"]])
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, inits[name])


@pytest.mark.parametrize("scale", [0.1, 1e-4])
def test_initial_scale(make, scale):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        with pyro.plate("plate", 50):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = make(model, init_scale=scale)
    low, high = guide.quantiles(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([-1.0, 1.0])))["z"]
    torch.testing.assert_close(high - low, torch.full((50,), 2 * scale), rtol=2e-3, atol=0.0)


# --- guides in lists, and parts of them


def test_parts_of_a_list(make, elbo):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5, 5)))
        with pyro.plate("plate", 3):
            pyro.sample("z", dist.LogNormal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(make(poutine.block(model, expose=["x"])))
    guide.append(make(poutine.block(model, expose=["y"])))
    guide.append(AutoNormal(poutine.block(model, expose=["z"])))
    assert set(guide()) == {"x", "y", "z"}
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    assert torch.tensor([svi.step() for _ in range(3)]).isfinite().all()
    assert set(guide.median()) == {"x", "y", "z"}


def test_beside_a_guide_by_hand(make):
    def by_hand():
        loc = pyro.param("x_loc", torch.tensor(1.0))
        return {"x": pyro.sample("x", dist.Delta(loc))}

    guide = AutoGuideList(skewed)
    guide.append(by_hand)
    guide.append(make(poutine.block(skewed, hide=["x"])))
    assert set(guide()) == {"x", "y", "z"}
    svi = SVI(skewed, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    assert "x_loc" in pyro.get_param_store()


def test_lists_in_lists(make):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.x_loc = nn.Parameter(torch.tensor(1.0))
            self.x_scale = PyroParam(torch.tensor(0.1), constraints.positive)

        def forward(self):
            pyro.sample("x", dist.Normal(self.x_loc, self.x_scale))
            with pyro.plate("plate", 2):
                pyro.sample("y", dist.Normal(2.0, 0.1))

    model = Model()
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    inner.part = make(poutine.block(model, expose=["y"]))
    guide.append(inner)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    check_model_guide_match(poutine.trace(model).get_trace(), poutine.trace(guide).get_trace())


def test_beside_enumerated_sites(make):
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    @config_enumerate
    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = make(model)
    assert "assignment" not in guide(data)
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert torch.tensor(loss.loss_and_grads(model, guide, data)).isfinite()

    both = AutoGuideList(model)
    both.append(make(poutine.block(model, hide=["assignment"])))
    both.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    assert torch.tensor(loss.loss_and_grads(model, both, data)).isfinite()


# --- Bayesian regression: latents outside the plate of the observations


class RandomLinear(nn.Linear, PyroModule):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))


class Regression(PyroModule):
    def __init__(self, size, features):
        super().__init__()
        self.size, self.linear = size, RandomLinear(features, 1)

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        with pyro.plate("plate", self.size):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def test_regression(make, elbo):
    x, y = torch.randn(10, 3), torch.randn(10)
    model = Regression(10, 3)
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), elbo())
    assert torch.tensor([svi.step(x, y) for _ in range(3)]).isfinite().all()


def test_predictions(make):
    x, y = torch.randn(3, 2), torch.randn(3)
    model = Regression(3, 2)
    guide = make(model)
    guide(x, y=y)
    of_model = poutine.trace(model).get_trace(x)
    predictive = Predictive(model, guide=guide, num_samples=10)

    samples = predictive(x)

    for site in prune_subsample_sites(of_model).stochastic_nodes:
        assert samples[site].shape[0] == 10
    assert samples["obs"].shape == (10, 3)
    # As a file that needs no Pyro.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
    assert len(again.call(x)) == len(samples)


def test_as_a_file_without_pyro(make):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 2):
            pyro.sample("y", dist.LogNormal(0.0, 1.0))
            pyro.sample("z", dist.Beta(2.0, 2.0))

    guide = make(model)
    guide()
    pyro.set_rng_seed(0)
    expected = guide.call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace_module(guide, {"call": ()}, check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        again = torch.jit.load(file)
    pyro.set_rng_seed(0)
    for one, two in zip(again.call(), expected, strict=True):
        assert torch.equal(one, two)
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in guide.named_parameters()}


def test_copies_and_pickles(make):
    model = Regression(3, 2)
    x, y = torch.randn(3, 2), torch.randn(3)
    guide = make(model)
    guide(x, y)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        draws = []
        for each in (guide, other):
            pyro.set_rng_seed(0)
            draws.append(each(x, y))
        assert all(torch.equal(value, draws[1][name]) for name, value in draws[0].items())
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert not torch.equal(next(other.parameters()), next(guide.parameters()))
    other = make(model)
    other.load_state_dict(guide.state_dict())
    other(x, y)
    for one, two in zip(guide.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_jit(make):
    x, y = torch.randn(10, 3), torch.randn(10)
    model = Regression(10, 3)
    guide = make(model)
    guide(x, y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), JitTrace_ELBO(ignore_jit_warnings=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.tensor([svi.step(x, y) for _ in range(2)]).isfinite().all()


# --- minibatches


ROWS = {name: each for name, each in GUIDES.items() if name != "globals alone"}


@pytest.mark.parametrize("name", ROWS)
def test_the_model_draws_its_rows(name, elbo):
    def model(x, y=None, batch_size=None):
        loc = pyro.param("loc", lambda: torch.tensor(0.0))
        with pyro.plate("batch", len(x), subsample_size=batch_size):
            batch_x = pyro.subsample(x, event_dim=0)
            batch_y = pyro.subsample(y, event_dim=0) if y is not None else None
            sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
            return pyro.sample("obs", dist.Normal(loc + batch_x, sigma), obs=batch_y)

    x, y = torch.randn(50), torch.randn(50)
    guide = ROWS[name](model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo())
    assert torch.tensor([svi.step(x, y, batch_size=20) for _ in range(4)]).isfinite().all()
    of_guide = poutine.trace(guide).get_trace(x, y, batch_size=20)
    of_model = poutine.trace(poutine.replay(model, of_guide)).get_trace(x, y, batch_size=20)
    assert torch.equal(of_model.nodes["obs"]["value"], y[of_guide.nodes["batch"]["value"]])


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("in_list", [False, True])
def test_plates_are_created_for_given_rows(name, in_list):
    def model(batch, subsample, full_size):
        drift = pyro.sample("drift", dist.LogNormal(-1, 0.5))
        with pyro.plate("data", full_size, subsample=subsample):
            z = 0.0
            for t in range(len(batch)):
                z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
                pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=batch[t])

    def create_plates(batch, subsample, full_size):
        return pyro.plate("data", full_size, subsample=subsample)

    data = torch.bernoulli(torch.full((4, 50), 0.5))
    if in_list:
        guide = AutoGuideList(model, create_plates=create_plates)
        guide.append(AutoDelta(poutine.block(model, expose=["drift"])))
        guide.append(ROWS[name](poutine.block(model, hide=["drift"])))
    else:
        guide = ROWS[name](model, create_plates=create_plates)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for index in torch.arange(50).split(20):
        assert torch.tensor(svi.step(data[:, index], index, full_size=50)).isfinite()


@pytest.mark.parametrize("name", ["constant", "factorized"])
@pytest.mark.parametrize("independent", [True, False])
def test_rows_of_crossed_plates_are_drawn_by_the_guide(name, independent):
    size, count = 10, 4

    def model(data):
        with pyro.plate("origin", size, dim=-2), pyro.plate("destination", size, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch = pyro.subsample(data, event_dim=0)
            pyro.sample("obs", dist.Normal(z, 1.0), obs=batch)

    def create_plates(data):
        origin = pyro.plate("origin", size, subsample_size=count, dim=-2)
        if independent:
            return origin, pyro.plate("destination", size, subsample_size=count, dim=-1)
        with origin as rows:
            pass
        return origin, pyro.plate("destination", size, subsample=rows, dim=-1)

    guide = ROWS[name](model, plate=("origin", "destination"), create_plates=create_plates)
    data = torch.randn(size, size)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert torch.tensor([svi.step(data) for _ in range(3)]).isfinite().all()
    of_guide = poutine.trace(guide).get_trace(data)
    of_model = poutine.trace(poutine.replay(model, of_guide)).get_trace(data)
    i, j = (of_guide.nodes[plate]["value"] for plate in ("origin", "destination"))
    assert torch.equal(of_model.nodes["obs"]["value"], data[i[:, None], j])
    assert independent or torch.equal(i, j)


def test_nested_plates(make, elbo):
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("outer", 4, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), scale))
            with pyro.plate("inner", 3, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(4, 3)
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo())
    assert torch.tensor([svi.step(x) for _ in range(3)]).isfinite().all()
    assert guide(x)["z"].shape == guide.median(x)["z"].shape == (4, 1)


def test_a_model_without_latents_is_refused(make):
    def model():
        pass

    with pytest.raises(ValueError, match="(?s)a model with a latent, found none.*nothing to infer"):
        make(model)()
