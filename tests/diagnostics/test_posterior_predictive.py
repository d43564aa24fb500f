"""The posterior predictive: what a model would observe again, given the draws of a guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal

import pyro_avi as avi
from pyro_avi.diagnostics.posterior_predictive import Predictor
from tests.all_guides import takes
from tests.guides.test_contract import GUIDES, set_up, stir
from tests.structures import STRUCTURES

X = torch.linspace(-2, 2, 6, dtype=torch.float64)


def model(x, index=None, size=6):
    theta = pyro.sample("theta", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(theta.sum(-1), 1.0))
        return pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def far(one, other):
    """How many standard errors the means of two sets of draws are apart, at most, and those of their squares.

    Of bounded functions of the draws, whose own tails may be long.
    """
    center, worst = one.double().median(0).values, 0.0
    scale = (one - center).abs().median(0).values.clamp(min=1e-6)
    one, other = (((draws - center) / scale).tanh() for draws in (one.double(), other.double()))
    for power in (1, 2):
        a, b = one**power, other**power
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        same = (a.mean(0) - b.mean(0)).abs() < 1e-9
        worst = max(worst, ((a.mean(0) - b.mean(0)).abs() / error).masked_fill(same, 0.0).max().item())
    return worst


def unobserved(program):
    """The model without its observations; what it computes, ``uncondition`` would draw."""

    def computed(msg):
        return msg["type"] == "sample" and msg["infer"].get("_deterministic", False)

    def run(*args, **kwargs):
        with poutine.uncondition(), poutine.block(hide_fn=computed):
            return program(*args, **kwargs)

    return run


def in_turn(name):
    kinds = [kind for kind in GUIDES if takes(kind, discrete=bool(STRUCTURES[name].discrete))]
    return kinds[list(STRUCTURES).index(name) % len(kinds)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_draws_are_those_of_predictive_together_and_one_by_one(name, monkeypatch):
    structure = STRUCTURES[name]
    program, guide = set_up(in_turn(name), name)
    stir(guide)
    args, kwargs = structure.args, structure.kwargs
    at_once = name != "enumerated latent"
    count = 2000 if at_once else 200
    together = avi.posterior_predictive(program, guide, *args, num_samples=count, **kwargs)
    assert Predictor(program, guide, args, kwargs).at_once is at_once
    monkeypatch.setattr(Predictor, "at_once", False)
    apart = avi.posterior_predictive(program, guide, *args, num_samples=200, **kwargs)
    assert together.keys() == apart.keys() and together
    for site, draws in together.items():
        assert draws.shape[1:] == apart[site].shape[1:] and len(draws) == count
        # Five standard errors of at most some 100 numbers; small samples have longer tails.
        assert far(draws, apart[site]) < 6, site
    if not at_once:
        # Predictive draws these from their prior.
        return
    parallel = Predictive(unobserved(program), guide=guide, num_samples=2000, parallel=True)
    with torch.no_grad(), poutine.block():
        theirs = parallel(*args, **kwargs)
    for site, draws in together.items():
        assert far(draws, theirs[site].reshape(draws.shape)) < 6, site


def normals(x, index=None):
    with pyro.plate("data", 6, subsample=index):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def exact(x):
    """A guide that is the posterior."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x, 0.2**0.5))


def assert_normal(draws, mean, variance):
    count = len(draws)
    errors = (draws.var(0) / count) ** 0.5, draws.var(0) * (2 / count) ** 0.5
    assert all((error < 0.02).all() for error in errors)
    return max(
        ((draws.mean(0) - mean).abs() / errors[0]).max().item(),
        ((draws.var(0) - variance).abs() / errors[1]).max().item(),
    )


def test_of_normals_it_is_known():
    draws = avi.posterior_predictive(normals, exact, X, num_samples=40_000)["x"]
    assert assert_normal(draws, 0.8 * X, 0.45) < 5
    # The twin: latents at their posterior means.
    twin = avi.posterior_predictive(normals, lambda x: exact_mean(x), X, num_samples=40_000)["x"]
    assert assert_normal(twin, 0.8 * X, 0.45) > 20


def exact_mean(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(0.8 * x))


def test_enumerated_latents_are_drawn_from_their_posterior():
    def clusters(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(X.new_zeros(()), 0.1))
            label = pyro.sample("label", dist.Bernoulli(X.new_tensor(0.3)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + 2 * label, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(X.new_zeros(len(x))))

    draws = avi.posterior_predictive(clusters, guide, X, num_samples=500)["x"]
    one = 0.3 * dist.Normal(2.0, 1.0).log_prob(X).exp()
    share = one / (one + 0.7 * dist.Normal(0.0, 1.0).log_prob(X).exp())
    error = (draws.var(0) / len(draws)) ** 0.5
    assert ((draws.mean(0) - 2 * share).abs() / error).max() < 5
    # The twin: from the prior.
    assert ((draws.mean(0) - 2 * 0.3).abs() / error).max() > 10


def test_a_latent_that_depends_on_an_enumerated_one_stands_in_its_draws():
    def clusters(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(X.new_tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(X.new_tensor([-2.0, 1.0])[k], 1.0))
            pyro.sample("x", dist.Normal(z + k, 0.1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(X))

    draws = avi.posterior_predictive(clusters, guide, X + 0.5, num_samples=400)["x"] - X
    # The label given z and x, a half from both: by its density of z alone.
    logits = X.new_tensor([0.3, 0.7]).log() + dist.Normal(X.new_tensor([-2.0, 1.0]), 1.0).log_prob(X[:, None])
    error = (draws.var(0) / len(draws)).sqrt()
    assert ((draws.mean(0) - logits.softmax(-1)[:, 1]).abs() / error).max() < 5
    # The twin: from the prior.
    assert ((draws.mean(0) - 0.7).abs() / error).max() > 10


def test_rows_of_a_minibatch_are_its_own():
    index = torch.tensor([4, 1])
    guide = avi.FactorizedGuide(normals).setup(X)
    with torch.no_grad():
        guide.table[:, 0], guide.table[:, 1] = 10 * torch.arange(6), -5.0
    draws = avi.posterior_predictive(normals, guide, X[index], index, num_samples=50)["x"]
    assert draws.shape == (50, 2) and ((draws.mean(0) - torch.tensor([40.0, 10.0])).abs() < 1).all()
    with pytest.raises(ValueError, match="avi.refine"):
        avi.posterior_predictive(avi.models.VAE(avi.models.DenseDecoder(2, (4,), (1, 2, 2)), size=6),
                                 fitted_to_six(), torch.rand(5, 1, 2, 2), num_samples=2)  # fmt: skip


def fitted_to_six():
    vae = avi.models.VAE(avi.models.DenseDecoder(2, (4,), (1, 2, 2)), size=6)
    return avi.FactorizedGuide(vae).setup(torch.rand(6, 1, 2, 2))


def test_observations_that_are_left_out_are_drawn_as_well():
    guide = avi.ConstantGuide(model).setup(X)
    given, left_out = (avi.posterior_predictive(model, guide, x, num_samples=2000)["x"] for x in (X, None))
    assert given.shape == left_out.shape == (2000, 6) and far(given, left_out) < 5


def earlier(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        first = pyro.sample("first", dist.Normal(z, 1.0), obs=x)
        pyro.sample("second", dist.Normal(100 * first, 1e-3), obs=100 * x)


def test_observations_that_follow_one_another_do_so_again():
    draws = avi.posterior_predictive(earlier, avi.ConstantGuide(earlier).setup(X), X, num_samples=20)
    torch.testing.assert_close(draws["second"], 100 * draws["first"], rtol=0, atol=0.1)
    assert (draws["first"] - X).abs().mean() > 0.1


def by_hand(x):
    # The first element along the leftmost dimension: another one in a plate around the model.
    theta = pyro.sample("theta", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta[0], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def total(x):
    theta = pyro.sample("theta", dist.Normal(X.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(theta.sum(), 0.5), obs=x)


@pytest.mark.parametrize("program", [by_hand, total])
@pytest.mark.parametrize("make", [AutoNormal, AutoLowRankMultivariateNormal])
def test_what_would_be_others_together_is_drawn_one_by_one(program, make):
    guide = make(program, init_scale=0.5)
    guide(X)
    assert not Predictor(program, guide, (X,), {}).at_once
    draws = avi.posterior_predictive(program, guide, X, num_samples=800)["x"]
    # By hand: Predictive itself gives models a dimension more.
    theirs = []
    with torch.no_grad(), poutine.block():
        for _ in range(800):
            trace = poutine.trace(guide).get_trace(X)
            theirs.append(poutine.trace(poutine.replay(unobserved(program), trace)).get_trace(X).nodes["x"]["value"])
    assert far(draws, torch.stack(theirs)) < 5


class WithDropout(avi.models.VAE):
    def __init__(self):
        super().__init__(avi.models.DenseDecoder(2, (4,), (1, 2, 2)), size=6)
        self.dropout, self.modes = torch.nn.Dropout(0.5), []
        self.dropout.register_forward_hook(lambda module, *_: self.modes.append(module.training))

    def forward(self, x=None, index=None):
        self.dropout(torch.ones(3))
        return super().forward(x, index)


def test_the_program_is_left_as_it_is_and_the_seed_decides():
    vae, x = WithDropout(), torch.rand(6, 1, 2, 2)
    guide = avi.AmortizedGuide(vae).setup(x)
    vae.modes.clear()
    state = torch.get_rng_state()
    one, same, other = (avi.posterior_predictive(vae, guide, x, num_samples=3, seed=s)["x"] for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and not one.requires_grad
    assert torch.equal(state, torch.get_rng_state()) and not set(pyro.get_param_store())
    assert vae.modes and not any(vae.modes) and vae.dropout.training


def drawing(x):
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def only_factors(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.factor("x", -((z - x) ** 2))


class Undrawable(dist.Normal):
    def sample(self, *args, **kwargs):
        raise NotImplementedError

    rsample = sample


def undrawable(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample("x", Undrawable(z, 0.5), obs=x)


def series(x, duration=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        probs = torch.softmax(torch.stack([z, -z], -1), -1)
        moves, observed = torch.eye(2).log(), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        states = dist.DiscreteHMM(probs.log(), moves, observed, duration=duration)
        pyro.sample("x", states, obs=x[:, None].float().expand(-1, 3))


def test_a_series_of_given_duration_is_drawn():
    guide = avi.ConstantGuide(series).setup(X, duration=3)
    assert avi.posterior_predictive(series, guide, X, duration=3, num_samples=4)["x"].shape == (4, 6, 3)


class Short(dist.MultivariateNormal):
    """Draws with fewer elements than it has."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape)[..., :2]


def short(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(X.new_zeros(()), 1.0))
        pyro.sample(
            "x", Short(z[..., None].expand(*z.shape, 3), torch.eye(3, dtype=X.dtype)), obs=x[:, None].expand(-1, 3)
        )


REFUSED = {
    "too short": (short, 3, r"observations that can be drawn like the data, got site 'x' with draws of shape \(2,\)"),
    "no draws": (normals, 0, "num_samples of at least 1, got 0"),
    "rows of its own": (drawing, 3, "the same rows in every draw"),
    "no observations": (only_factors, 3, "a model with observations to draw.*pyro.factor"),
    "another length": (
        series,
        3,
        r"observations that can be drawn like the data, got one of \['x'\].*AssertionError.*duration=",
    ),
    "no sample": (
        undrawable,
        3,
        r"observations that can be drawn like the data, got one of \['x'\].*posterior_predictive=False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_errors_say_what_to_do(case):
    program, num_samples, message = REFUSED[case]
    guide = avi.ConstantGuide(program, plate="data").setup(X)
    with pytest.raises(ValueError, match=f"(?s)Expected {message}"):
        avi.posterior_predictive(program, guide, X, num_samples=num_samples)


def test_a_chunk_is_no_larger_than_memory_allows(monkeypatch):
    guide = avi.ConstantGuide(normals).setup(X)
    monkeypatch.setattr("pyro_avi.diagnostics.posterior_predictive._AT_A_TIME", 4 * 2 * X.numel() * 8)
    predictor = Predictor(normals, guide, (X,), {})
    assert sum(predictor.chunks(10)) == 10 and 1 < max(predictor.chunks(10)) <= 4
    assert avi.posterior_predictive(normals, guide, X, num_samples=10)["x"].shape == (10, 6)
