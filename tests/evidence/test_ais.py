"""Annealed importance sampling against identities and closed forms, from below and from above."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_avi as avi
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.estimators import ais as arrays
from pyro_avi.evidence.ais import annealed_weights, isolated_sampling

ROWS = 12
WEIGHT = torch.tensor([[1.0, 0.7], [0.6, 1.0], [0.5, -0.5]], dtype=torch.float64)
SIGMA = 0.6


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


# --- on arrays: the mean weight is the ratio of the normalizers

LOG_RATIO = tensor([1.5, -2.0])
CENTER, WIDTH = tensor([[0.8, -0.4], [0.0, 1.0]]), tensor([[0.6, 0.8], [0.7, 0.5]])


def normals(u):
    """A standard normal, and another normal for each of two rows times a number."""
    target = dist.Normal(CENTER, WIDTH).log_prob(u).sum(-1) + LOG_RATIO
    return dist.Normal(0.0, 1.0).log_prob(u).sum(-1), target


def error_in_standard_errors(reverse=False, num_temperatures=10, draws=20_000, step_size=0.7):
    start = CENTER + WIDTH * torch.randn(draws, 2, 2).double() if reverse else torch.randn(draws, 2, 2).double()
    sizes = torch.full((num_temperatures - 1, 2), step_size, dtype=torch.double)
    beta = arrays.temperatures(num_temperatures)
    local = arrays.anneal(normals, start, beta=beta, step_sizes=sizes, num_leapfrog=2, reverse=reverse)
    ratio = (LOG_RATIO - local if reverse else local - LOG_RATIO).exp()
    error = ratio.std(0) / draws**0.5
    # Precise enough to tell.
    assert (error < 0.05).all()
    return ((ratio.mean(0) - 1) / error).abs().max().item()


@pytest.mark.parametrize("reverse", [False, True])
def test_weights_are_unbiased_whatever_the_step_size(reverse):
    # Steps so long that a good part of the proposals is refused.
    assert error_in_standard_errors(reverse) < 5


WRONG = {
    "all": lambda log_ratio: log_ratio > -math.inf,
    "inverse": lambda log_ratio: torch.rand_like(log_ratio).log() < -log_ratio,
    "half": lambda log_ratio: torch.rand_like(log_ratio).log() < log_ratio / 2,
}


@pytest.mark.parametrize("rule", WRONG)
def test_a_wrong_rule_of_acceptance_is_seen(monkeypatch, rule):
    monkeypatch.setattr(arrays, "_accept", WRONG[rule])
    assert error_in_standard_errors() > 10


def test_the_pilot_finds_step_sizes_at_which_four_of_five_are_accepted():
    beta = arrays.temperatures(40)
    sizes = arrays.pilot(normals, torch.randn(16, 2, 2).double(), beta=beta, num_leapfrog=3)
    assert sizes.shape == (39, 2)
    point, rates = arrays._Point.evaluate(normals, torch.randn(4000, 2, 2).double()), []
    for t in range(1, 40):
        point, rate = arrays._transition(normals, point, beta[t].item(), sizes[t - 1], 3)
        rates.append(rate.mean(0))
    assert (torch.stack(rates).mean(0) - 0.8).abs().max() < 0.1


def test_temperatures_rise_from_zero_to_one():
    beta = arrays.temperatures(7)
    assert beta[0] == 0 and beta[-1] == 1 and (beta.diff() > 0).all() and len(beta) == 8
    torch.testing.assert_close(beta + beta.flip(0), torch.ones(8).double())
    assert arrays.temperatures(1).tolist() == [0.0, 1.0]


# --- on models


def factors(x, index=None):
    """Factor analysis: z_n ~ N(0, I), x_n ~ N(W z_n, SIGMA^2)."""
    with pyro.plate("data", ROWS, subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, SIGMA).to_event(1), obs=x)


def factor_data():
    z = torch.randn(ROWS, 2).double()
    x = z @ WEIGHT.T + SIGMA * torch.randn(ROWS, 3).double()
    covariance = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(3).double()
    evidence = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x)
    precision = torch.eye(2).double() + WEIGHT.T @ WEIGHT / SIGMA**2
    mean = torch.linalg.solve(precision, WEIGHT.T @ x.T / SIGMA**2).T
    return x, evidence, dist.MultivariateNormal(mean, precision_matrix=precision)


def exact_guide(x, posterior):
    guide = avi.FactorizedGuide(factors, family=avi.MultivariateNormal()).setup(x)
    factor = posterior.scale_tril[0]
    log_scale = factor.diagonal().log()
    lower = factor[1, 0] / factor[1, 1]
    with torch.no_grad():
        guide.table.copy_(torch.cat([posterior.mean, torch.cat([log_scale, lower[None]]).expand(ROWS, 3)], 1))
    return guide


def test_from_the_posterior_every_chain_gives_the_evidence():
    x, evidence, posterior = factor_data()
    guide = exact_guide(x, posterior)
    draws = {"z": posterior.sample((3,))}
    for options in ({}, {"reverse": draws}):
        bound = avi.ais(factors, guide, x, num_chains=3, num_temperatures=4, num_leapfrog=2, **options)
        torch.testing.assert_close(bound.rows, evidence, rtol=0.0, atol=1e-10)
        assert bound.value == pytest.approx(evidence.sum().item(), abs=1e-9) and bound.se < 1e-9


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_evidence_lies_between_the_two_bounds(start):
    x, evidence, posterior = factor_data()
    guide = avi.AmortizedGuide(factors, (4,), init_scale=0.8).setup(x)
    budget = {"num_chains": 400, "num_temperatures": 40, "num_leapfrog": 3, "start": start}
    lower = avi.ais(factors, guide, x, **budget)
    upper = avi.ais(factors, guide, x, reverse={"z": posterior.sample((400,))}, **budget)
    exact = evidence.sum().item()
    # Of twelve rows together, within a nat: the budget that the documentation states.
    assert exact - 1 < lower.value < exact + 5 * lower.se
    assert exact - 5 * upper.se < upper.value < exact + 1
    assert lower.se < 0.3 and upper.se < 0.3
    assert (lower.rows - evidence).abs().max() < 5 * lower.rows_se.max() < 1
    # Without annealing the same draws leave more to wish for.
    plain = avi.ais(factors, guide, x, **{**budget, "num_temperatures": 1})
    assert plain.value < lower.value


def test_the_latents_that_data_were_drawn_with_bound_from_above():
    trace = poutine.trace(poutine.uncondition(factors)).get_trace(torch.zeros(ROWS, 3).double())
    x, z = trace.nodes["x"]["value"], trace.nodes["z"]["value"]
    guide = avi.ConstantGuide(factors, init_scale=1.0).setup(x)
    budget = {"num_chains": 10, "num_temperatures": 20, "num_leapfrog": 3, "start": "prior"}
    lower, upper = avi.ais(factors, guide, x, **budget), avi.ais(factors, guide, x, reverse={"z": z}, **budget)
    assert lower.value < upper.value < lower.value + 8


def curved(x):
    """A tanh decoder of one latent: the evidence by quadrature."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        loc = torch.stack([2 * torch.tanh(2 * z), torch.tanh(z - 1), z.square()], -1)
        pyro.sample("x", dist.Normal(loc, 0.4).to_event(1), obs=x)


def test_a_curved_decoder_has_the_evidence_of_quadrature_and_of_importance_sampling():
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    x = torch.stack([2 * torch.tanh(2 * z[1500:2600:100]), torch.tanh(z[1500:2600:100] - 1), z[1500:2600:100] ** 2], -1)
    x = x + 0.4 * torch.randn_like(x)
    loc = torch.stack([2 * torch.tanh(2 * z), torch.tanh(z - 1), z.square()], -1)
    joint = dist.Normal(loc[:, None], 0.4).log_prob(x).sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
    evidence = joint.logsumexp(0) + math.log(z[1] - z[0])
    guide = avi.ConstantGuide(curved, init_scale=1.0).setup(x)
    bound = avi.ais(curved, guide, x, num_chains=2000, num_temperatures=15, num_leapfrog=4, start="prior")
    plain = avi.ais(curved, guide, x, num_chains=100_000, num_temperatures=1, num_leapfrog=1, start="prior")
    for estimate in (bound, plain):
        assert abs(estimate.value - estimate.bias - evidence.sum().item()) < 5 * estimate.se < 1


# --- coordinates, plates, memory


def supports(x):
    """Latents on three supports, one in a plate of its own inside the rows."""
    with pyro.plate("data", x.shape[-1], dim=-2):
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.5))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3).double()))
        with pyro.plate("inner", 2, dim=-1):
            level = pyro.sample("level", dist.Normal(tensor(0.0), 1.0))
        loc = (level.sum(-1, keepdim=True) + rate * share[..., 0]).squeeze(-1)
        pyro.sample("x", dist.Normal(loc.unsqueeze(-1), 0.5), obs=x.unsqueeze(-1))


def test_the_joint_is_that_of_the_log_weights():
    x = torch.randn(5).double()
    for family in (avi.DiagonalNormal(), avi.MultivariateNormal()):
        guide = avi.FactorizedGuide(supports, plate="data", family=family).setup(x)
        with torch.no_grad():
            guide.table.add_(0.3 * torch.randn_like(guide.table))
        joint = LocalJoint(supports, (x,), {}, plate="data")
        assert joint.at_once and (joint.num_rows, joint.num_latents) == (5, 1 + 2 + 2)
        torch.manual_seed(1)
        weights = avi.log_weights(supports, guide, x, num_samples=4, seed=1, plate="data")
        torch.manual_seed(1)
        traces = [poutine.trace(guide).get_trace(x) for _ in range(4)]
        values = {
            name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in ("rate", "share", "level")
        }
        u = joint.coordinates(values, 4)
        prior, likelihood = joint(u)
        q = guide.fixed_posterior(x).log_prob(u)
        torch.testing.assert_close(prior + likelihood - q, weights.local, rtol=0.0, atol=1e-9)
        assert joint.prior_draws(7).shape == (7, 5, 5)


def counts(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(tensor(2.0), 1.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def test_a_latent_on_another_support_has_the_evidence_of_its_own_density():
    x = tensor([0.0, 1.0, 4.0, 9.0])
    evidence = dist.GammaPoisson(2.0, 1.5).log_prob(x)
    guide = avi.ConstantGuide(counts, init_scale=0.8).setup(x)
    for start in ("guide", "prior"):
        bound = avi.ais(counts, guide, x, num_chains=400, num_temperatures=10, num_leapfrog=3, start=start)
        assert ((bound.rows - bound.rows_bias - evidence).abs() < 5 * bound.rows_se).all()
        assert bound.rows_se.max() < 0.1


def stubborn(x, index=None):
    """`factors`, written so that it runs for one point at a time only."""
    with pyro.plate("data", ROWS, subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.reshape(len(x), 2) @ WEIGHT.T, SIGMA).to_event(1), obs=x)


def test_models_that_take_one_point_at_a_time_give_the_same():
    x, evidence, posterior = factor_data()
    one, other = (LocalJoint(model, (x,), {}, plate="data") for model in (factors, stubborn))
    assert one.at_once and not other.at_once
    u = torch.randn(3, ROWS, 2).double()
    for a, b in zip(one(u), other(u), strict=True):
        torch.testing.assert_close(a, b)
    assert other.prior_draws(3).shape == (3, ROWS, 2)
    guide = avi.ConstantGuide(stubborn, init_scale=0.8).setup(x)
    bound = avi.ais(stubborn, guide, x, num_chains=4, num_temperatures=3, num_leapfrog=1)
    assert bound.rows.isfinite().all()


def test_a_minibatch_counts_for_all_rows():
    x, evidence, posterior = factor_data()
    index = torch.tensor([4, 1, 7])
    guide = exact_guide(x, posterior)
    bound = avi.ais(factors, guide, x[index], index, num_chains=2, num_temperatures=2, num_leapfrog=1)
    torch.testing.assert_close(bound.rows, evidence[index], rtol=0.0, atol=1e-10)
    assert bound.value == pytest.approx(ROWS / 3 * evidence[index].sum().item())


def test_memory_is_bounded_by_running_fewer_chains_at_a_time():
    x, *_ = factor_data()
    joint = LocalJoint(factors, (x,), {}, plate="data")
    cost = joint.memory()
    # At least the coordinates and what the likelihood keeps, in double precision.
    assert cost > 8 * x.numel()
    assert joint.chunks(10, 2 * cost * 4) == [4, 4, 2] and joint.chunks(3, 1) == [1, 1, 1]
    guide = avi.ConstantGuide(factors, init_scale=0.8).setup(x)
    budget = {"num_chains": 5, "num_temperatures": 3, "num_leapfrog": 1}
    assert avi.ais(factors, guide, x, max_memory=1, **budget).rows.isfinite().all()


# --- global latents


def shared(x):
    theta = pyro.sample("theta", dist.Normal(tensor(0.0), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(theta + z, 0.5), obs=x)


@pytest.mark.parametrize("theta", ["mean", "draw", {"theta": tensor(-0.7)}])
def test_the_evidence_is_that_given_theta(theta):
    x = torch.linspace(-2, 2, 5).double()
    guide = avi.ConstantGuide(shared, init_scale=0.8).setup(x)
    with torch.no_grad():
        guide.global_guide.vector.copy_(tensor([0.4, math.log(0.6)]))
    budget = {"num_chains": 2000, "num_temperatures": 12, "num_leapfrog": 3}
    bound = avi.ais(shared, guide, x, theta=theta, seed=3, **budget)
    if theta == "draw":
        with torch.random.fork_rng():
            torch.manual_seed(3)
            value = guide.global_guide(x)["theta"].detach()
        assert (value - 0.4).abs() > 0.05
    else:
        value = tensor(0.4) if theta == "mean" else theta["theta"]
    exact = dist.Normal(value, 1.25**0.5).log_prob(x)
    assert ((bound.rows - bound.rows_bias - exact).abs() < 5 * bound.rows_se).all() and bound.rows_se.max() < 0.1
    assert not ((bound.rows - dist.Normal(value + 0.2, 1.25**0.5).log_prob(x)).abs() < 5 * bound.rows_se).all()


def test_the_program_is_left_as_it_is():
    x = torch.linspace(-2, 2, 5).double()
    guide = avi.ConstantGuide(shared).setup(x)
    before, state = [p.detach().clone() for p in guide.parameters()], torch.get_rng_state()
    budget = {"num_chains": 3, "num_temperatures": 3, "num_leapfrog": 1}
    one, same, other = (avi.ais(shared, guide, x, seed=seed, **budget).rows for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state()) and not set(pyro.get_param_store())
    for old, now in zip(before, guide.parameters(), strict=True):
        assert torch.equal(old, now) and now.grad is None and now.requires_grad


# --- errors


def masked(x):
    with pyro.plate("data", len(x)), poutine.mask(mask=x > 0):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def switched(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(x.new_full((), 0.5)))
        pyro.sample("x", dist.Normal(k, 1.0), obs=x)


def unbounded(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.factor("infinite", torch.full_like(z, math.inf))


BUDGET = {"num_chains": 2, "num_temperatures": 2, "num_leapfrog": 1}
ERRORS = {
    "chains": (factors, {"num_chains": 0}, "Expected num_chains of at least 1, got 0"),
    "temperatures": (factors, {"num_temperatures": 0}, "Expected num_temperatures of at least 1, got 0"),
    "start": (factors, {"start": "posterior"}, 'Expected start= to be "guide" or "prior", got'),
    "site": (factors, {"reverse": {"y": torch.zeros(2)}}, r"values of the latents \['z'\], got \['y'\]"),
    "shape": (factors, {"reverse": {"z": torch.zeros(5, 2)}}, r"of shape \(12, 2\) or \(2, 12, 2\), got \(5, 2\)"),
    "mask": (masked, {}, "latent 'z' under a mask or a scale"),
    "discrete": (switched, {"start": "prior"}, "the discrete latent 'k'"),
    "infinite": (unbounded, {}, "whose weights are nan or infinite"),
    "theta": (shared, {"theta": "median"}, 'to be "mean", "draw" or the values'),
    "theta's sites": (shared, {"theta": {}}, r"global latents \['theta'\], got \[\]"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    model, options, message = ERRORS[case]
    x = torch.randn(ROWS, 3).double() if model is factors else torch.randn(4).double()
    guide = avi.ConstantGuide(model).setup(x)
    with pytest.raises(ValueError, match=message):
        avi.ais(model, guide, x, **{**BUDGET, **options})


def test_other_guides_are_refused():
    with pytest.raises(TypeError, match="(?s)Expected a ConstantGuide.*got function.*avi.log_weights"):
        avi.ais(factors, lambda x: None, torch.zeros(ROWS, 3), **BUDGET)


def test_a_guide_for_other_rows_is_refused():
    x, *_ = factor_data()
    joint = LocalJoint(factors, (x,), {}, plate="data")
    with isolated_sampling(0), pytest.raises(ValueError, match="factor of 12 rows with 2 latents, got"):
        annealed_weights(joint, dist.Normal(torch.zeros(3, 2), 1.0).to_event(1), **BUDGET)
