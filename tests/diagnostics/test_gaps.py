"""Gaps against closed forms: a linear model with normal noise, whose best factors and their losses are known."""

import math

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_avi as avi
from pyro_avi.closing import factor_search as search_module
from pyro_avi.closing.remaining_gain import remaining_gain
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.diagnostics.gaps import _Measurement
from pyro_avi.estimators.gains import cross_fitted
from pyro_avi.estimators.iwelbo import log_mean_exp
from pyro_avi.evidence.evidence import Evidence
from pyro_avi.evidence.hold_globals import Conditional, hold_globals
from pyro_avi.evidence.mixture import mixture_weights
from tests.own_family import EULER, SkewedFamily

ROWS, SIGMA = 6, 0.6
WEIGHT = torch.tensor([[1.0, 0.7], [0.6, 1.0], [0.5, 0.5]], dtype=torch.float64)
PRECISION = torch.eye(2, dtype=torch.float64) + WEIGHT.T @ WEIGHT / SIGMA**2
# What independent normals lose, for every row: (sum_i log M_ii - log |M|) / 2.
DIAGONAL_LOSS = 0.5 * (PRECISION.diagonal().log().sum() - PRECISION.logdet()).item()
SHORT = {"num_samples": 400, "num_steps": 100, "max_rounds": 4}
AS_IT_IS = {"num_samples": 50, "num_steps": 1, "max_rounds": 1, "lr": 0.0}


class Factors:
    """z_n ~ N(0, I), x_n ~ N(W z_n, SIGMA^2)."""

    def __call__(self, x, index=None):
        size = len(x) if index is None else ROWS
        with pyro.plate("data", size, subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ WEIGHT.T, SIGMA).to_event(1), obs=x)


class KnownFactors(Factors):
    def log_evidence(self, x):
        covariance = WEIGHT @ WEIGHT.T + SIGMA**2 * torch.eye(3, dtype=torch.float64)
        return dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x)


def data(rows=ROWS):
    return torch.randn(rows, 2).double() @ WEIGHT.T + SIGMA * torch.randn(rows, 3).double()


def best_table(x):
    """The means of the posterior and the conditional variances."""
    mean = torch.linalg.solve(PRECISION, WEIGHT.T @ x.T / SIGMA**2).T
    return torch.cat([mean, -0.5 * PRECISION.diagonal().log().expand(len(x), 2)], 1)


def off_by(x, shift, log_stretch):
    """A guide whose factors miss the best ones by known amounts, and what each row loses by that."""
    model = KnownFactors()
    guide = avi.FactorizedGuide(model).setup(x)
    shift, log_stretch = shift.double(), log_stretch.double()
    with torch.no_grad():
        guide.table.copy_(best_table(x) + torch.cat([shift, log_stretch], 1))
    loss = 0.5 * ((shift @ PRECISION) * shift).sum(1) + (0.5 * torch.expm1(2 * log_stretch) - log_stretch).sum(1)
    return model, guide, loss


def agrees(estimate, exact, *, at_most):
    """Within five standard errors in every row and in total, and precise enough to tell; 1e-9 for what is exact."""
    rows = torch.as_tensor(exact).double().expand_as(estimate.rows)
    assert 5 * estimate.rows_se.max() < at_most and 5 * estimate.se < at_most * len(rows)
    near = (estimate.rows - rows).abs() <= 5 * estimate.rows_se + 1e-9
    return bool(near.all()) and abs(estimate.value - rows.sum().item()) <= 5 * estimate.se + 1e-9


# --- closed forms


def test_every_gap_is_what_it_must_be():
    x = data()
    model, guide, loss = off_by(x, 0.4 * torch.randn(ROWS, 2), 0.3 * torch.randn(ROWS, 2))
    gaps = avi.measure_gaps(model, guide, x, **{**SHORT, "num_samples": 10_000, "max_rounds": 5, "tolerance": 0.02})
    evidence = model.log_evidence(x)
    # What refinement leaves is below its tolerance.
    left = gaps.approximation.rows - DIAGONAL_LOSS
    assert gaps.exact and gaps.converged.sum() >= ROWS - 1 and not gaps.unreliable.any() and gaps.slack.value == 0
    assert (left.abs() < 5 * gaps.approximation.rows_se + 0.02).all() and gaps.approximation.rows_se.max() < 0.1
    assert ((gaps.amortization.rows - loss).abs() < 5 * gaps.amortization.rows_se + 0.02).all()
    assert agrees(gaps.inference, loss + DIAGONAL_LOSS, at_most=0.4)
    assert torch.equal(gaps.evidence.rows, evidence) and gaps.evidence.se == 0
    torch.testing.assert_close(gaps.inference.rows, gaps.approximation.rows + gaps.amortization.rows)
    torch.testing.assert_close(gaps.elbo.rows, evidence - gaps.inference.rows)
    # Twins: other parts, and the wrong sign.
    assert not agrees(gaps.inference, loss, at_most=0.4)
    assert not agrees(gaps.inference, DIAGONAL_LOSS - loss, at_most=0.4)


def test_a_guide_at_its_best_has_no_amortization_gap():
    x = data()
    model, guide, _ = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    gaps = avi.measure_gaps(model, guide, x, **SHORT)
    # By common draws: the difference is known ten times better than either bound.
    assert gaps.amortization.rows_se.max() < 0.1 * gaps.elbo.rows_se.min()
    assert (gaps.amortization.rows.abs() < 5 * gaps.amortization.rows_se + 0.005).all()
    assert agrees(gaps.inference, DIAGONAL_LOSS, at_most=0.4)
    # Twin: a guide that is a little off.
    model, guide, loss = off_by(x, torch.full((ROWS, 2), 0.3), torch.zeros(ROWS, 2))
    gaps = avi.measure_gaps(model, guide, x, **{**SHORT, "num_steps": 50, "max_rounds": 1})
    assert gaps.amortization.value > 0.7 * loss.sum() > 5 * gaps.amortization.se


def test_mirrored_draws_cancel_a_shift():
    # Draws of normals are symmetric: a shift changes no pair but by what it costs.
    x = data()
    model, guide, loss = off_by(x, torch.full((ROWS, 2), 0.3), torch.zeros(ROWS, 2))
    gaps = avi.measure_gaps(model, guide, x, starts=[best_table(x)], **AS_IT_IS)
    torch.testing.assert_close(gaps.amortization.rows, loss, rtol=0.0, atol=1e-9)
    assert gaps.amortization.se < 1e-9 < 0.01 < gaps.elbo.se


def test_a_richer_family_closes_what_is_its_own():
    x = data()
    model, guide, loss = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    options = {"num_samples": 2000, "num_steps": 150, "max_rounds": 3, "tolerance": 0.02}
    gaps = avi.measure_gaps(model, guide, x, richer=avi.MultivariateNormal(), **options)
    # All normals hold the posterior.
    assert ((gaps.richer.rows - DIAGONAL_LOSS).abs() < 5 * gaps.richer.rows_se + 0.03).all()
    assert 5 * gaps.richer.rows_se.max() < 0.15 < DIAGONAL_LOSS / 2
    short = avi.measure_gaps(
        model, guide, x, richer=avi.MultivariateNormal(), **{**AS_IT_IS, "num_steps": 5, "lr": 0.05}
    )
    assert not short.converged.all()


def bent(x):
    """x_n ~ N(z_n2 + z_n1^2, 0.4^2): the posterior is a banana."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 1] + z[..., 0].square(), 0.4), obs=x)


def evidence_of_bent(x):
    grid = torch.linspace(-6, 6, 601, dtype=torch.float64)
    first, second = torch.meshgrid(grid, grid, indexing="ij")
    prior = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.0, 1.0).log_prob(second)
    joint = prior + dist.Normal(second + first.square(), 0.4).log_prob(x.reshape(-1, 1, 1))
    return joint.flatten(1).logsumexp(1) + 2 * (grid[1] - grid[0]).log()


def best_of_bent(steps, **options):
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    guide = avi.ConstantGuide(bent).setup(x)
    with torch.no_grad():
        guide.vector.copy_(torch.tensor([0.0, 0.0, -0.7, -0.7]))
    budget = {"num_samples": 1000, "num_steps": steps, "max_rounds": 1, "evidence": evidence_of_bent(x)}
    return avi.measure_gaps(bent, guide, x, **{**budget, "richer": avi.RowFlow(), **options})


def test_a_flow_starts_as_the_best_normals_and_never_loses():
    # Without a step the flow is q*, by other draws, so that q* stays: what it gains is nothing, exactly.
    x = data()
    model, guide, _ = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    family = avi.RowFlow(hidden=3, bins=4)
    family.prepare(2)
    normals = guide.posterior(x)
    flow = family.distribution(family.initial(normals.mean, normals.stddev))
    u = torch.randn(50, ROWS, 2, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(u), normals.log_prob(u))
    gaps = avi.measure_gaps(model, guide, x, richer=family, **{**AS_IT_IS, "num_samples": 2000})
    assert (gaps.richer.rows > -5 * gaps.richer.rows_se - 1e-9).all()


@pytest.mark.slow
def test_a_flow_closes_most_of_what_normals_lose():
    gaps = best_of_bent(1000, lr=0.05)
    assert gaps.exact and (gaps.approximation.rows > 5 * gaps.approximation.rows_se).all()
    assert gaps.richer.value > 0.5 * gaps.approximation.value
    # No bound is above the evidence.
    left = gaps.approximation.rows - gaps.richer.rows
    assert (left > -5 * gaps.approximation.rows_se).all()
    # Twin: all normals close little of it.
    assert best_of_bent(300, lr=0.05, richer=avi.MultivariateNormal()).richer.value < 0.5 * gaps.richer.value


def test_without_an_answer_the_gaps_are_intervals_around_it():
    x = data()
    known, guide, loss = off_by(x, 0.3 * torch.randn(ROWS, 2), torch.zeros(ROWS, 2))
    model, evidence = Factors(), known.log_evidence(x)
    z = dist.MultivariateNormal(best_table(x)[:, :2], precision_matrix=PRECISION).sample((50,))
    budget = {"num_chains": 50, "num_temperatures": 10, "num_leapfrog": 2}
    for options in ({}, {"annealing": budget}, {"annealing": budget, "reverse": {"z": z}}):
        gaps = avi.measure_gaps(model, guide, x, **{**AS_IT_IS, "num_samples": 400}, **options)
        low, error = gaps.evidence.rows, 5 * (gaps.evidence.rows_se + gaps.slack.rows_se)
        assert not gaps.exact and (low < evidence + error).all()
        assert (low + gaps.slack.rows > evidence - error).all() and (gaps.slack.rows >= 0).all()
        assert abs(gaps.inference.value - ROWS * DIAGONAL_LOSS - loss.sum()) < 5 * gaps.inference.se + gaps.slack.value
    # Given by the caller, it is a point again.
    gaps = avi.measure_gaps(model, guide, x, evidence=evidence, **AS_IT_IS)
    assert gaps.exact and torch.equal(gaps.evidence.rows, evidence)


def two_modes(x):
    """x_n ~ N(z_n^2, 0.5^2) with a prior around 1: the mode of positive z is the better one."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_ones(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def test_rows_in_a_worse_optimum_are_found_out():
    x = torch.full((4,), 4.0, dtype=torch.float64)
    guide = avi.FactorizedGuide(two_modes).setup(x)
    with torch.no_grad():
        guide.table.copy_(torch.tensor([2.0, math.log(0.12)]).expand(4, 2))
        guide.table[0, 0] = -2.0
    gaps = avi.measure_gaps(two_modes, guide, x, **SHORT)
    # From z = 2 to z = -2 the log prior falls by 4.
    assert 3.5 < gaps.amortization.rows[0] < 4.5 and gaps.amortization.rows[1:].max() < 0.5
    assert gaps.lost_most(1).tolist() == [0]


def test_rows_that_still_gain_are_reported():
    x = data()
    model, guide, _ = off_by(x, torch.full((ROWS, 2), 3.0), torch.zeros(ROWS, 2))
    gaps = avi.measure_gaps(model, guide, x, num_samples=30, num_steps=3, max_rounds=1)
    assert not gaps.converged.any() and "6 of them not converged" in gaps.table()


def test_it_ends_when_nothing_is_gained(monkeypatch):
    calls, take_steps = [], search_module.take_steps
    monkeypatch.setattr(
        search_module, "take_steps", lambda *args, **kwargs: calls.append(1) or take_steps(*args, **kwargs)
    )
    x = data()
    model, guide, _ = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    avi.measure_gaps(model, guide, x, num_samples=50, num_steps=20, max_rounds=9, starts=[guide.table.detach()])
    # Three starts of its own, one given, and no second round.
    assert len(calls) == 4


def test_held_out_rows_and_the_generalization_gap():
    # An encoder for the data that rows are like, and rows that are twice as far out.
    train, test = data(100), 2 * data(60)
    model = KnownFactors()
    guide = avi.ConstantGuide(model).setup(train)
    with torch.no_grad():
        guide.vector.copy_(torch.cat([torch.zeros(2).double(), best_table(train)[0, 2:]]))
    gaps = [avi.measure_gaps(model, guide, x, starts=[best_table(x)], **AS_IT_IS) for x in (train, test)]
    gap = gaps[0].generalization(gaps[1])
    lost = [0.5 * ((table @ PRECISION) * table).sum(1) for table in (best_table(x)[:, :2] for x in (train, test))]
    assert abs(gap.value - (lost[1].mean() - lost[0].mean())) < 0.3 * gap.se and gap.value > 3 * gap.se
    assert gap.se == pytest.approx((lost[0].var() / 100 + lost[1].var() / 60).sqrt().item(), rel=0.2)
    assert gap.rows.shape == (60,)


def shared(x):
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta + z, 0.5), obs=x)


def test_gaps_are_those_given_theta():
    x = torch.linspace(-2, 2, 5).double()
    guide = avi.AmortizedGuide(shared, torch.nn.Identity(), inputs=lambda x: x[:, None], init_scale=0.5).setup(x)
    with torch.no_grad():
        guide.global_guide.vector.copy_(torch.tensor([0.5, -1.0]))
    loc, log_scale = guide.variational_parameters(x).detach().unbind(1)
    for theta, value in (("mean", 0.5), ({"theta": torch.tensor(-1.0).double()}, -1.0)):
        best = torch.stack([0.8 * (x - value), torch.full_like(x, 0.5 * math.log(0.2))], 1)
        options = {**AS_IT_IS, "num_samples": 2000, "starts": [best]}
        gaps = avi.measure_gaps(shared, guide, x, theta=theta, **options)
        evidence = dist.Normal(value, 1.25**0.5).log_prob(x)
        torch.testing.assert_close(gaps.evidence.rows, evidence, rtol=0.0, atol=1e-6)
        # One latent: normals hold the posterior, so that all of the gap is amortization.
        exact = torch.distributions.kl_divergence(
            dist.Normal(loc, log_scale.exp()), dist.Normal(0.8 * (x - value), 0.2**0.5)
        )
        assert ((gaps.amortization.rows - exact).abs() < 5 * gaps.amortization.rows_se + 1e-9).all()
        assert gaps.amortization.rows_se.max() < 0.2 < exact.max()


def test_the_program_is_left_as_it_is():
    x = data()
    model, guide, _ = off_by(x, torch.ones(ROWS, 2), torch.zeros(ROWS, 2))
    before, state = guide.table.detach().clone(), torch.get_rng_state()
    options = {"num_samples": 30, "num_steps": 5, "max_rounds": 1}
    one, same, other = (avi.measure_gaps(model, guide, x, seed=seed, **options).inference.rows for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state()) and not set(pyro.get_param_store())
    assert torch.equal(before, guide.table) and guide.table.grad is None


def test_draws_in_pieces_are_the_same_gaps_but_for_their_draws():
    x = data()
    model, guide, loss = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    options = {**AS_IT_IS, "max_memory": 1}
    assert agrees(avi.measure_gaps(model, guide, x, **options).inference, DIAGONAL_LOSS, at_most=1.5)


# --- doubt


def heavy(x):
    """A latent that the data say nothing about, with tails that no normal has."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Cauchy(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def test_draws_of_the_prior_cover_tails_that_the_guide_has_not():
    x = torch.zeros(3).double()
    guide = avi.ConstantGuide(heavy, init_scale=0.5).setup(x)
    gaps = avi.measure_gaps(heavy, guide, x, **{**AS_IT_IS, "num_samples": 1000})
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    assert gaps.khat.unreliable.any() and not gaps.unreliable.any()
    assert ((gaps.evidence.rows - exact).abs() < 5 * gaps.evidence.rows_se).all() and gaps.evidence.rows_se.max() < 0.1
    # Twin: the guide's own draws alone.
    alone = log_mean_exp(avi.log_weights(heavy, guide, x, num_samples=1000).local)
    assert (alone < exact - 0.2).any()


def test_the_better_of_two_bounds_is_taken_with_its_error():
    e = torch.randn(400, 2).double()
    weights = avi.LogWeights(0.5 * e.square() * torch.tensor([0.1, 0.95]), torch.zeros(400), 1.0, has_globals=False)
    one = Evidence(None, weights)
    assert one.unreliable.tolist() == [False, True] and one.slack(None).rows[0] < 0.1
    level = torch.tensor([-9.0, 9.0]).double()
    chains = avi.LogWeights(0.1 * torch.randn(50, 2).double() + level, torch.zeros(50), 1.0, has_globals=False)
    two, zero = Evidence(None, weights, [chains]), torch.zeros(400, 2).double()
    assert not two.unreliable.any() and two.slack(None).value < 0.1
    rows, errors = two.above(zero).rows, two.above(zero).rows_se
    assert rows[0] == one.above(zero).rows[0] and errors[0] == one.above(zero).rows_se[0]
    annealed = avi.iwelbo(chains)
    assert rows[1] == annealed.rows[1] and errors[1].item() == pytest.approx(annealed.rows_se[1].item())


def endless(x):
    """The evidence of every row is infinite: the factor grows faster than the prior falls."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("factor", z.square())
        pyro.sample("x", dist.Normal(x.new_zeros(()), 1.0), obs=x)


def test_an_infinite_evidence_has_no_end_known():
    x = torch.zeros(3).double()
    guide = avi.ConstantGuide(endless, init_scale=1.0).setup(x)
    gaps = avi.measure_gaps(endless, guide, x, **{**AS_IT_IS, "num_samples": 1000})
    assert gaps.unreliable.all() and (gaps.slack.rows == math.inf).all() and gaps.slack.value == 0.0
    assert "evidence of 3 unreliable and no end known" in gaps.table()


# --- two modes, discrete latents, what has converged


def mirrored(x):
    """x_n ~ N(z_n^2, 0.1^2): two modes, alike, of which normals hold one."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.1), obs=x)


def test_the_mode_that_no_factor_covers_is_part_of_the_evidence():
    x = torch.linspace(1.0, 3.0, 8, dtype=torch.float64)
    guide = avi.FactorizedGuide(mirrored).setup(x)
    with torch.no_grad():
        guide.table.copy_(torch.stack([x.sqrt(), (0.05 / x.sqrt()).log()], 1))
    gaps = avi.measure_gaps(mirrored, guide, x, num_samples=500, num_steps=100, max_rounds=2)
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid.square(), 0.1).log_prob(x[:, None])
    exact = joint.logsumexp(1) + (grid[1] - grid[0]).log()
    low, error = gaps.evidence.rows, 5 * gaps.evidence.rows_se
    inside = (low < exact + error) & (low + gaps.slack.rows > exact - error)
    assert (inside | gaps.unreliable).all() and (~gaps.unreliable).sum() >= 4 and error.max() < 0.69
    # Twin: a factor's own draws are short by log 2.
    alone = log_mean_exp(avi.log_weights(mirrored, guide, x, num_samples=2000).local)
    assert ((alone - exact + math.log(2)).abs() < 0.1).all()
    # What is lost to the second mode is the family's.
    sure = ~gaps.unreliable
    assert ((gaps.approximation.rows[sure] - math.log(2)).abs() < 5 * gaps.approximation.rows_se[sure] + 0.05).all()


def test_draws_of_a_mixture_give_the_evidence_and_no_part_alone_decides():
    x = data()
    model, guide, _ = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    joint = LocalJoint(model, (x,), {}, plate="data")
    far = guide.table.detach() + torch.tensor([3.0, 3.0, 0.0, 0.0])
    factors = [guide.row_factors[0].factor.distribution(table) for table in (guide.table.detach(), far)]
    bound = avi.iwelbo(mixture_weights(joint, factors, num_samples=3000, max_memory=2**30))
    assert ((bound.rows - model.log_evidence(x)).abs() < 5 * bound.rows_se).all() and bound.rows_se.max() < 0.1


def test_what_the_slope_promises_is_what_is_left():
    x = data(30)
    shift, stretch = 0.2 * torch.randn(30, 2), 0.2 * torch.randn(30, 2)
    model, guide, loss = off_by(x, shift, stretch)
    joint, factor = LocalJoint(model, (x,), {}, plate="data"), guide.row_factors[0].factor
    left = remaining_gain(joint, factor, guide.table, seed=0, max_memory=2**30)
    # Never much less than what is left, and not much more.
    assert 0.8 * loss.sum() < left.rows.sum() < 2 * loss.sum()
    assert (loss <= left.at_most(3.0) + 0.3 * loss).all()
    best = remaining_gain(joint, factor, best_table(x), seed=0, max_memory=2**30)
    assert (best.rows.abs() < 4 * best.rows_se + 1e-9).all() and (best.at_most() < 0.03).all()


@pytest.mark.parametrize("steps", [2, 5])
def test_few_steps_are_not_taken_for_convergence(steps):
    x = data(40)
    model, guide, _ = off_by(x, torch.randn(40, 2), 0.5 * torch.randn(40, 2))
    gaps = avi.measure_gaps(model, guide, x, num_samples=400, num_steps=steps, max_rounds=5)
    short = gaps.approximation.rows - DIAGONAL_LOSS
    draws = mean_se(gaps)
    assert (short[gaps.converged] < 0.05 + 3 * draws[gaps.converged]).all() and (short > 0.1).any()
    # The error covers what the factors lack.
    assert (short.abs() < 3 * gaps.approximation.rows_se).double().mean() > 0.9


def mean_se(gaps):
    """The error of the draws alone."""
    return torch.hypot(gaps.elbo.rows_se, gaps.amortization.rows_se)


def test_at_the_best_no_row_moves():
    x = data(200)
    model, guide, _ = off_by(x, torch.zeros(200, 2), torch.zeros(200, 2))
    gaps = avi.measure_gaps(model, guide, x, num_samples=200, num_steps=20, max_rounds=2)
    assert gaps.amortization.value > -2 * gaps.amortization.se - 1e-9
    assert (gaps.amortization.rows != 0).sum() <= 4


def test_rows_gain_by_other_draws_than_those_that_choose():
    noise = torch.randn(400, 1000).double()
    before, after = noise, noise + torch.randn(400, 1000).double() - 0.01
    chosen = cross_fitted(before, after) - before
    assert chosen.sum(1).mean() >= -1.0
    # Twin: rows that are chosen by the draws that report them seem to gain.
    difference = after - before
    assert torch.where(difference.mean(0) > 0, difference, 0.0).mean(0).sum() > 10
    # And a small gain of every row is found.
    shifted = cross_fitted(before, before + 0.1 + 0.3 * torch.randn(400, 1000).double()) - before
    assert 95 < shifted.mean(0).sum() < 101


def labelled(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(x.new_tensor([0.3, 0.7])))
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(4.0 * k + z, 1.0), obs=x)


def test_rows_with_discrete_latents_have_gaps():
    x = torch.tensor([-1.0, 0.5, 4.2], dtype=torch.float64)
    guide = avi.ConstantGuide(labelled).setup(x)
    gaps = avi.measure_gaps(labelled, guide, x, num_samples=100, num_steps=60, max_rounds=1)
    loc = torch.tensor([0.0, 4.0], dtype=torch.float64)
    exact = (torch.tensor([0.3, 0.7]).log() + dist.Normal(loc, 2**0.5).log_prob(x[:, None])).logsumexp(1)
    assert ((gaps.evidence.rows - exact).abs() < 5 * gaps.evidence.rows_se)[~gaps.unreliable].all()
    assert gaps.amortization.value > 5 * gaps.amortization.se and not gaps.converged.any()


# --- tables and figures


def some_gaps(**options):
    x = data()
    model, guide, _ = off_by(x, 0.5 * torch.randn(ROWS, 2), torch.zeros(ROWS, 2))
    options = {**AS_IT_IS, **options}
    return avi.measure_gaps(model, guide, x, **options)


def test_the_table_says_what_the_gaps_are():
    gaps = some_gaps(richer=avi.MultivariateNormal())
    frame = gaps.table("frame")
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["amortization gap", "value"] == pytest.approx(gaps.amortization.rows.mean().item())
    assert frame.loc["amortization gap", "se"] == pytest.approx(gaps.amortization.se / ROWS)
    parts = frame.loc[["approximation gap", "amortization gap"], "value"].sum()
    assert parts == pytest.approx(frame.loc["inference gap", "value"])
    assert frame.loc["log evidence", "value"] - frame.loc["ELBO", "value"] == pytest.approx(parts)
    text, markdown = gaps.table(), gaps.table("markdown")
    assert f"{gaps.amortization.value / ROWS:.3f}" in text and "closed by the richer family" in text
    assert markdown.splitlines()[1] == "| --- | ---: | ---: |" and "6 rows" in markdown
    x = data()
    _, guide, _ = off_by(x, torch.zeros(ROWS, 2), torch.zeros(ROWS, 2))
    bounded = avi.measure_gaps(Factors(), guide, x, **AS_IT_IS)
    assert "log evidence (bound)" in bounded.table() and "up to" in bounded.table("markdown")
    assert bounded.table("frame").loc["inference gap", "to"] > bounded.table("frame").loc["inference gap", "value"]


def test_every_row_has_a_line():
    gaps = some_gaps(richer=avi.MultivariateNormal())
    frame = gaps.by_row()
    assert len(frame) == ROWS and not frame.isna().any().any()
    assert frame["richer"].tolist() == gaps.richer.rows.tolist()
    assert frame["amortization_se"].tolist() == gaps.amortization.rows_se.tolist()
    assert ((frame["inference"] - frame["approximation"] - frame["amortization"]).abs() < 1e-9).all()
    assert ((frame["evidence"] - frame["elbo"] - frame["inference"]).abs() < 1e-9).all()
    assert (frame["draws"] == AS_IT_IS["num_samples"]).all() and (frame["ess"] <= frame["draws"] + 1e-9).all()
    assert frame["converged"].tolist() == gaps.converged.tolist() and frame["slack"].eq(0).all()
    assert not {"richer", "richer_se"} & set(some_gaps().by_row())


def test_the_figure_has_a_bar_for_every_guide():
    one, two = some_gaps(richer=avi.MultivariateNormal()), some_gaps()
    figure = one.plot({"other": two}, name="one", images=torch.rand(ROWS, 4, 4), worst=3)
    bars, rows, most = figure.axes
    assert [label.get_text() for label in bars.get_xticklabels()] == ["one", "other"]
    height = sum(patch.get_height() for patch in bars.patches[:3])
    assert height == pytest.approx(one.inference.rows.mean().item())
    assert len(rows.lines) == 4 and len(most.get_yticks()) == 3
    assert [int(label.get_text().strip("*?")) for label in most.get_yticklabels()] == one.lost_most(3).tolist()
    assert figure._repr_png_().startswith(b"\x89PNG")


# --- errors


def crossed(x):
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


ERRORS = {
    "draws": ({"num_samples": 24}, "Expected num_samples of at least 25, got 24"),
    "steps": ({"num_steps": 0}, "Expected num_steps of at least 1, got 0"),
    "rounds": ({"max_rounds": 0}, "Expected max_rounds of at least 1, got 0"),
    "evidence": ({"evidence": torch.zeros(3)}, r"each of the 6 rows, got shape \(3,\)"),
    "infinite": ({"evidence": torch.full((6,), math.inf)}, "with values that are no numbers"),
    "budget": ({"annealing": {"num_chains": 30}}, "Expected annealing= with"),
    "chains": ({"annealing": {"num_chains": 3, "num_temperatures": 2, "num_leapfrog": 1}}, "num_chains of at least 25"),
    "reverse": ({"reverse": {"z": torch.zeros(6, 2)}}, "Expected annealing= with the budget"),
    "flow": ({"richer": avi.Flow(transforms=1, hidden=(4,), context=1, bins=2)}, "(?s)rows alone, got Flow.*RowFlow"),
    "start": ({"starts": [torch.zeros(5, 4)]}, r"Expected start of shape \(6, 4\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    options, message = ERRORS[case]
    x = data()
    guide = avi.FactorizedGuide(Factors()).setup(x)
    with pytest.raises(ValueError, match=message):
        avi.measure_gaps(Factors(), guide, x, **{"num_samples": 25, "num_steps": 1, "max_rounds": 1, **options})


def test_calls_about_the_wrong_rows_are_refused():
    x, budget = data(), {"num_samples": 25, "num_steps": 1}
    guide = avi.AmortizedGuide(Factors(), (4,)).setup(x)
    with pytest.raises(ValueError, match="Expected all rows of a data set, got 2 of 6"):
        avi.measure_gaps(Factors(), guide, x[:2], torch.tensor([3, 1]), **budget)
    with pytest.raises(ValueError, match=r"got rows \[4\] \(1 of 6\) whose weights are nan"):
        broken = x.clone()
        broken[4, 1] = math.nan
        avi.measure_gaps(Factors(), guide, broken, **budget)
    table = avi.FactorizedGuide(Factors()).setup(x)
    with pytest.raises(ValueError, match="avi.refine"):
        avi.measure_gaps(Factors(), table, data(4), **budget)
    cells = torch.randn(3, 2).double()
    guide = avi.FactorizedGuide(crossed, plate=("rows", "columns")).setup(cells)
    with pytest.raises(ValueError, match="Expected rows of one plate, got those of"):
        chains = {"num_chains": 25, "num_temperatures": 2, "num_leapfrog": 1}
        avi.measure_gaps(crossed, guide, cells, annealing=chains, **budget)


def with_a_hole(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("hole", torch.where(z > 1.0, -math.inf, 0.0).to(z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def infinite(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.factor("peak", torch.where(z > 1.0, math.inf, 0.0).to(z))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def one_more(x):
    with pyro.plate("data", len(x)):
        w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)


def test_densities_that_are_no_numbers_are_refused():
    x = torch.zeros(4).double()
    for model, message in (
        (with_a_hole, r"density above zero at every draw of the guide, got"),
        (infinite, "infinite"),
    ):
        guide = avi.ConstantGuide(model, init_scale=1.0).setup(x)
        with pytest.raises(ValueError, match=message):
            avi.measure_gaps(model, guide, x, **{**AS_IT_IS, "num_samples": 200})


def test_a_guide_that_misses_a_latent_is_refused():
    x = torch.zeros(4).double()
    guide = avi.ConstantGuide(with_a_hole).setup(x)
    with pytest.raises(ValueError, match=r"latents \[\['w', 'z'\]\] of the model's rows, got one for \[\['z'\]\]"):
        avi.measure_gaps(one_more, guide, x, **AS_IT_IS)


def test_a_table_has_three_formats():
    with pytest.raises(ValueError, match='"text", "markdown" or "frame", got \'html\''):
        some_gaps().table("html")
    with pytest.raises(ValueError, match="Expected an image for each of the 6 rows, got 2"):
        some_gaps().plot(images=torch.rand(2, 3, 3))


def test_conditioning_hides_global_latents():
    trace = poutine.trace(Conditional(shared, {"theta": torch.tensor(1.0)})).get_trace(torch.zeros(3))
    assert "theta" not in trace.nodes and "z" in trace.nodes


# --- other guides and models


@pytest.mark.parametrize("global_guide", [None, AutoNormal, AutoDelta])
@pytest.mark.parametrize("theta", ["mean", "draw"])
def test_any_guide_of_the_globals_will_do(global_guide, theta):
    x = torch.linspace(-2, 2, 5).double()
    guide = avi.ConstantGuide(shared, global_guide=global_guide).setup(x)
    assert avi.measure_gaps(shared, guide, x, theta=theta, **AS_IT_IS).elbo.rows.isfinite().all()


FEW_WEIGHTS = [
    avi.Flow(transforms=1, hidden=(4,), context=1, bins=4),
    avi.RowFlow(transforms=1, hidden=3, bins=4),
    avi.LowRankNormal(1),
]


@pytest.mark.parametrize("family", FEW_WEIGHTS)
def test_any_family_and_decoder_will_do(family):
    x = torch.rand(5, 1, 3, 3)
    model = avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (4,), (1, 3, 3)), size=5)
    guide = avi.AmortizedGuide(model, (4,), family=family).setup(x)
    gaps = avi.measure_gaps(model, guide, x, **AS_IT_IS)
    assert gaps.inference.rows.isfinite().all() and gaps.amortization.rows.shape == (5,)
    # The table that stands for the guide has its factors, weights that rows share included.
    held, _ = hold_globals(model, guide, "mean", (x,), {}, seed=0)
    rows = _Measurement(held, ("data",), (x,), {}, 30, 0, 2**30)
    mine, theirs = rows.table_of(guide).posterior(x), guide.posterior(x)
    u = torch.randn(5, 2)
    torch.testing.assert_close(mine.log_prob(u), theirs.log_prob(u))


class MirroredFamily(SkewedFamily):
    """Says that it is symmetric, and is not."""

    symmetric = True


@pytest.mark.parametrize("family, is_true", [(SkewedFamily, True), (MirroredFamily, False)])
def test_the_gap_of_a_family_of_the_callers_own_is_its_divergence(family, is_true):
    def one_number(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(-2.0, 2.0, 8)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x)
    guide = avi.FactorizedGuide(one_number, family=family()).setup(x)
    with torch.no_grad():
        # The mean and the variance of the posterior.
        guide.table.copy_(family().initial(x.unsqueeze(-1) / 2, 0.5**0.5))

    gaps = avi.measure_gaps(one_number, guide, x, evidence=evidence, **{**AS_IT_IS, "num_samples": 4000})

    # From the Gumbel variable with the mean and variance of the posterior: minus its entropy, plus its cross-entropy.
    divergence = -(1 + EULER + math.log(6**0.5 / math.pi)) + 0.5 * math.log(2 * math.pi) + 0.5
    off, error = (gaps.approximation.rows - divergence).abs(), gaps.approximation.rows_se
    if is_true:
        assert error.max() < 0.05
        assert (off < 5 * error).all()
    else:
        # Mirrored draws are those of another distribution.
        assert (off > 0.2).all()
