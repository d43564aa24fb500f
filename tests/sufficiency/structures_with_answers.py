"""Small models whose verdict is known, each with the data of one call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

WHOLE = "of the whole plate"


@dataclass(frozen=True)
class Answer:
    """A model, its arguments and its verdict.

    Attributes:
        possible: by latent where they differ.
        inputs: what is needed; by latent where they differ. ``None`` where nothing is to be said of it.
        interpolates: the weaker question; ``None`` where undecided.
    """

    model: Callable
    args: tuple
    possible: bool | None | Mapping[str, bool | None]
    inputs: str | Mapping[str, str] | None = None
    interpolates: bool | None = True
    options: Mapping = field(default_factory=dict)


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


N = 12
X = _normal(N)
POSITIVE = _normal(N).exp()
COUNTS = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 2.0, 0.0, 5.0, 1.0, 4.0, 2.0, 6.0])
SIGNS = torch.tensor([0.0, 1.0] * 6)
GROUP = torch.arange(N) % 3
KNOWN = torch.arange(N) % 4 != 1
ANSWERS: dict[str, Answer] = {}


def case(*args, possible, **kwargs):
    def add(model):
        ANSWERS[model.__name__] = Answer(model, args, possible, **kwargs)
        return model

    return add


def latent(loc=0.0, scale=1.0, name="z"):
    return pyro.sample(name, dist.Normal(loc, scale))


def observe(loc, x, scale=1.0, name="x"):
    return pyro.sample(name, dist.Normal(loc, scale), obs=x)


def plate(x, name="data"):
    return pyro.plate(name, len(x))


def before(x, steps=1):
    return torch.cat([torch.zeros(steps), x[:-steps]])


# Independent rows.


@case(X, possible=True, inputs="x")
def normal_normal(x):
    theta = latent(name="theta")
    with plate(x):
        observe(theta + latent(), x)


@case(X, possible=True, inputs="x")
def hierarchy(x):
    mu, tau = latent(name="mu"), pyro.sample("tau", dist.HalfNormal(1.0))
    with plate(x):
        observe(latent(mu, tau), x)


@case(X, possible=True, inputs="x")
def scale_mixture(x):
    with plate(x):
        precision = pyro.sample("precision", dist.Gamma(2.0, 2.0))
        observe(0.0, x, precision.rsqrt())


@case(_normal(N, 4), possible=True, inputs="x")
def factor_analysis(x):
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([2, 4]).to_event(2))
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loadings, 1.0).to_event(1), obs=x)


_decoder = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))


@case((_normal(N, 4) > 0).float(), possible=True, inputs="x")
def vae(x):
    pyro.module("decoder", _decoder)
    with plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=_decoder(z)).to_event(1), obs=x)


@case(X, possible=True, inputs="x")
def mixture(x):
    means = pyro.sample("means", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with plate(x):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        observe(means[kind] + latent(), x)


@case(X, possible=True, inputs="x")
def sampled_mixture(x):
    means = pyro.sample("means", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with plate(x):
        observe(means[pyro.sample("kind", dist.Categorical(torch.ones(3) / 3))], x)


@case(COUNTS, possible=True, inputs="x")
def zero_inflated(x):
    with plate(x):
        rate = latent(0.0, 1.0).exp()
        pyro.sample("x", dist.ZeroInflatedPoisson(rate=rate, gate=torch.tensor(0.2)), obs=x)


@case((_normal(N, 5).abs() * 4).round(), possible=True, inputs="words")
def topics(words):
    topic = pyro.sample("topic", dist.Normal(0.0, 1.0).expand([3, 5]).to_event(2))
    with plate(words):
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.sample("words", dist.Poisson((shares @ topic).exp()).to_event(1), obs=words)


@case(_normal(N, 4), possible=True, inputs="returns")
def stochastic_volatility(returns):
    with plate(returns):
        steps = pyro.sample("steps", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("returns", dist.Normal(0.0, (steps.cumsum(-1) / 2).exp()).to_event(1), obs=returns)


@case(_normal(N, 3), possible=True, inputs="x")
def chains_by_row(x):
    with pyro.plate("sequences", len(x)):
        z = torch.zeros(len(x))
        for t in pyro.markov(range(3)):
            z = latent(0.9 * z, name=f"z_{t}")
            observe(z, x[:, t], name=f"x_{t}")


# Covariates, masks, exposures, sets.


@case(_normal(N, 2), X, possible=True, inputs="w, y")
def covariates(w, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with plate(y):
        observe(latent() + w @ slope, y, name="y")


@case(POSITIVE, COUNTS, possible=True, inputs="exposure, y")
def exposures(exposure, y):
    with plate(y):
        pyro.sample("y", dist.Poisson(exposure * latent().exp()), obs=y)


@case(X, GROUP, possible=True, inputs="x, group")
def kinds(x, group):
    effect = pyro.sample("effect", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with plate(x):
        observe(latent(effect[group]), x)


@case(X, KNOWN, possible=True, inputs="x, known")
def masked(x, known):
    with plate(x):
        z = latent()
        with poutine.mask(mask=known):
            observe(z, x)


@case(_normal(N, 4), torch.arange(N) % 4 + 1, possible=True, inputs="x, lengths")
def sets(x, lengths):
    with plate(x):
        z = latent()
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        pyro.sample("x", dist.Normal(z[:, None], 1.0).mask(inside).to_event(1), obs=x)


@case(POSITIVE, SIGNS, possible=True, inputs="time, event")
def survival(time, event):
    with plate(time):
        rate = latent().exp()
        pyro.factor("x", event * rate.log() - rate * time)


@case(X, POSITIVE, possible=True, inputs="x, noise")
def eight_schools(x, noise):
    mu, tau = latent(name="mu"), pyro.sample("tau", dist.HalfCauchy(5.0))
    with plate(x):
        observe(latent(mu, tau), x, noise)


@case(COUNTS + 5, COUNTS, possible=True, inputs="at_bats, hits")
def baseball(at_bats, hits):
    m, kappa = pyro.sample("m", dist.Uniform(0, 1)), pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with plate(hits, "players"):
        chance = pyro.sample("chance", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, chance), obs=hits)


@case((_normal(N, 3) > 0).float(), possible=True, inputs="y")
def capture_recapture(y):
    with pyro.plate("animals", len(y)):
        effect = latent(name="effect")
        for t in range(y.shape[1]):
            pyro.sample(f"y_{t}", dist.Bernoulli(logits=effect), obs=y[:, t])


@case(COUNTS[:, None] + torch.arange(3.0), possible=True, inputs="x")
def sparse_gamma(x):
    weights = pyro.sample("weights", dist.Gamma(1.0, 1.0).expand([2, 3]).to_event(2))
    with plate(x):
        z = pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("x", dist.Poisson(z @ weights).to_event(1), obs=x)


@case(_normal(8), torch.arange(3, 11), possible=True, inputs="x")
def minibatch(x, index):
    theta = latent(name="theta")
    with pyro.plate("data", 100, subsample=index):
        observe(latent(theta), x)


# Nested and crossed plates.


def _nested_model(x):
    groups, members = pyro.plate("groups", x.shape[0], dim=-2), pyro.plate("members", x.shape[1], dim=-1)
    with groups:
        mu = latent(name="mu")
        with members:
            observe(latent(mu), x)


@case(_normal(6, 4), possible=True, inputs="x", options={"plate": "groups"})
def groups_as_rows(x):
    _nested_model(x)


@case(
    _normal(6, 4),
    possible={"mu": True, "z": False},
    inputs={"mu": "x", "z": "x of other rows"},
    interpolates=None,
    options={"plate": ("groups", "members")},
)
def members_as_rows(x):
    _nested_model(x)


@case((_normal(9, 7) > 0).float(), possible=True, inputs="answer")
def item_response(answer):
    persons, items = pyro.plate("persons", answer.shape[0], dim=-2), pyro.plate("items", answer.shape[1], dim=-1)
    with persons:
        ability = latent(name="ability")
    with items:
        difficulty, slope = latent(name="difficulty"), pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    with persons, items:
        pyro.sample("answer", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=answer)


@case(_normal(9, 7), _normal(9, 7) > -0.3, possible=True, inputs="rating, known")
def matrix_factorization(rating, known):
    users, items = pyro.plate("users", rating.shape[0], dim=-2), pyro.plate("items", rating.shape[1], dim=-1)
    with users:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with items:
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with users, items, poutine.mask(mask=known):
        pyro.sample("rating", dist.Normal((u * v).sum(-1), 1.0), obs=rating)


OBSERVATIONS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 2, 2, 4])


@case(
    _normal(13),
    OBSERVATIONS,
    possible=True,
    inputs="the elements of y that belong to the row, which those are by group",
)
def random_intercepts(y, group):
    with pyro.plate("groups", 5):
        intercept = latent(name="intercept")
    with pyro.plate("observations", len(y)):
        observe(intercept[group], y, name="y")


@case(
    _normal(16),
    torch.arange(16) // 4,
    torch.arange(16) % 4,
    possible=True,
    inputs={
        "a": "the elements of y that belong to the row, which those are by one, which those are by two",
        "b": "the elements of y that belong to the row, which those are by one, which those are by two",
    },
)
def crossed_effects(y, one, two):
    with pyro.plate("firsts", 4):
        a = latent(name="a")
    with pyro.plate("seconds", 4):
        b = latent(name="b")
    with pyro.plate("observations", len(y)):
        observe(a[one] + b[two], y, name="y")


# Data of other rows.


@case(X, possible=False, inputs="x in window(1, 0)", interpolates=False)
def saw(x):
    with plate(x):
        observe(latent(before(x)), x)


@case(X, possible=False, inputs="x in window(0, 1)", interpolates=False)
def lead(x):
    with plate(x):
        observe(latent(torch.cat([x[1:], torch.zeros(1)])), x)


@case(X, possible=False, inputs="x in window(1, 1)", interpolates=False)
def both_sides(x):
    with plate(x):
        observe(latent(before(x) + torch.cat([x[1:], torch.zeros(1)])), x)


@case(_normal(20), possible=False, inputs="x in window(3, 0)", interpolates=False)
def season(x):
    with plate(x):
        observe(latent(before(x, 3)), x)


@case(X, possible=False, inputs="x in window(1, 0)", interpolates=False)
def autoregression_of_data(x):
    slope = latent(name="slope")
    with plate(x):
        observe(latent() + slope * before(x), x)


@case(X, possible=False, inputs=f"x {WHOLE}")
def prior_at_the_mean_of_data(x):
    with plate(x):
        observe(latent(x.mean()), x)


@case(X, torch.arange(N).flip(0), possible=False, interpolates=None)
def data_of_a_partner(x, partner):
    with plate(x):
        observe(latent(x[partner]), x)


# Coupled latents.


@case(X, possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def autoregression(x):
    with plate(x):
        z = latent()
        pyro.factor("steps", dist.Normal(0.9 * z[:-1], 0.5).log_prob(z[1:]).sum() / len(x))
        observe(z, x)


@case(X, possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def random_walk(x):
    with plate(x):
        observe(latent().cumsum(-1), x)


@case(X, possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def moving_average(x):
    with plate(x):
        e = latent(name="e")
        observe(e + 0.5 * before(e), x)


_lag = (torch.arange(N)[:, None] - torch.arange(N)).abs()
_covariance = (-0.5 * (_lag / 2.0) ** 2).exp() + 0.01 * torch.eye(N)


@case(X, possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def gaussian_process(x):
    with plate(x):
        observe(torch.linalg.cholesky(_covariance) @ latent(), x)


@case(X, _covariance, possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def gaussian_process_by_its_density(x, covariance):
    with plate(x):
        z = latent(scale=10.0)
        observe(z, x)
    pyro.factor("prior", dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(z))


@case(X, (_lag == 1).float(), possible=False, inputs=f"x {WHOLE}, the row's index", interpolates=False)
def conditional_autoregression(x, adjacency):
    with plate(x):
        z = latent()
        observe(z, x)
    pyro.factor("neighbours", 0.3 * z @ adjacency @ z)


@case(COUNTS, possible=False, inputs=f"x {WHOLE}")
def softmax(x):
    with plate(x):
        share = latent().softmax(-1)
        pyro.sample("x", dist.Poisson(30 * share), obs=x)


@case(X, possible=False, inputs=f"x {WHOLE}")
def centred(x):
    with plate(x):
        z = latent()
        observe(z - z.mean(-1, keepdim=True), x)


@case(X, torch.tensor(1.0), possible=False, inputs=f"x {WHOLE}")
def known_total(x, total):
    with plate(x):
        z = latent()
        observe(z, x)
    observe(z.sum(-1), total, name="total")


@case(
    (_normal(15) > 0).float(),
    torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]),
    torch.tensor([1, 2, 3, 4, 0, 2, 3, 4, 0, 1, 1, 3, 3, 0, 2]),
    possible=False,
    interpolates=None,
)
def bradley_terry(won, one, two):
    with pyro.plate("players", 5):
        skill = latent(name="skill")
    with pyro.plate("matches", len(won)):
        pyro.sample("won", dist.Bernoulli(logits=skill[one] - skill[two]), obs=won)


@case(POSITIVE.sort().values, SIGNS, possible=False, interpolates=None)
def cox(time, event):
    with plate(time):
        frailty = latent(name="frailty")
    at_risk = time[None] >= time[:, None]
    others = torch.where(at_risk, frailty, torch.tensor(-torch.inf)).logsumexp(-1)
    pyro.factor("partial", (event * (frailty - others)).sum())


@case(X, possible=False, inputs="x of other rows", interpolates=None)
def twins(x):
    with plate(x):
        z = latent()
        pairs = z.view(-1, 2).sum(-1).repeat_interleave(2)
        observe(pairs, x)


@case(X, torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6]), possible=False, interpolates=False)
def tree(x, parent):
    with plate(x):
        z = latent()
        observe(z + 0.5 * z[parent], x)


@case(SIGNS, possible=False, interpolates=False)
def ising(x):
    with plate(x):
        spin = pyro.sample("spin", dist.Bernoulli(0.5 * torch.ones(len(x))))
        pyro.sample("x", dist.Bernoulli(0.2 + 0.3 * spin + 0.3 * before(spin)), obs=x)


@case(X, _normal(N, 5), possible=False, interpolates=None)
def horseshoe(y, w):
    with pyro.plate("features", 5):
        scale = pyro.sample("scale", dist.HalfCauchy(1.0))
        slope = latent(0.0, scale, name="slope")
    with pyro.plate("data", len(y)):
        observe(w @ slope, y, name="y")


# What tells rows apart is no argument.


@case(X, possible=False, inputs="x, the row's index", interpolates=False)
def trend(x):
    slope = latent(name="slope")
    with plate(x):
        observe(latent(slope * torch.arange(len(x))), x)


@case(X, possible=False, inputs="x, the row's index", interpolates=False)
def hidden_noise(x):
    with plate(x):
        observe(latent(), x, POSITIVE)


# What derivatives do not see.


@case(X, possible=None, interpolates=None)
def ranks(x):
    with plate(x):
        z = latent()
        observe(z.argsort(-1).argsort(-1) * 0.3, x)


@case(X, possible=None, interpolates=None)
def threshold(x):
    with plate(x):
        z = latent()
        observe(z + (z > 0).double().mean(-1, keepdim=True) * z.round(), x)


@case(X, possible=None, interpolates=None)
def unsampled_noise(x):
    with plate(x):
        observe(latent() + 0.1 * torch.randn(len(x)), x)


@case(X, possible=None, interpolates=None)
def detached(x):
    with plate(x):
        z = latent()
        observe(z + z.mean(-1, keepdim=True).detach(), x)


@case(X, possible=None, interpolates=None)
def by_numpy(x):
    with plate(x):
        z = latent()
        observe(z + float(z.detach().numpy().mean()), x)


@case(X, possible=None, interpolates=None)
def changing_sites(x):
    with plate(x):
        z = latent()
        if torch.rand(()) < 0.5:
            latent(name="sometimes")
        observe(z, x)


@case(_normal(4), possible=None, interpolates=None)
def too_few_rows(x):
    with plate(x):
        observe(latent(before(x)), x)
