"""Reductions of log weights against identities, weights whose moments and tails are known, and ArviZ."""

import inspect
import math
from types import SimpleNamespace

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from pyro_avi import estimators
from pyro_avi.estimators.estimate import HasLogWeights, check_log_weights
from tests.discovery import names_in


def weights(local, *, global_=None, scale=1.0, has_globals=False):
    local = torch.as_tensor(local, dtype=torch.float64)
    return avi.LogWeights(local, torch.zeros(len(local)) if global_ is None else global_, scale, has_globals)


def gaussian(stretch, num_samples, rows=1, log_evidence=0.0):
    """Draws of a normal whose standard deviation is `stretch` times that of the normal posterior, weighed by it."""
    e = torch.randn(num_samples, rows, dtype=torch.float64)
    return weights(log_evidence + math.log(stretch) - 0.5 * (stretch**2 - 1) * e.square())


# --- identities


def test_one_draw_gives_the_elbo():
    one = weights([[1.0, -2.0, 0.5]], global_=torch.tensor([0.25]).double(), scale=3.0)
    bound, elbo = avi.iwelbo(one), avi.elbo(one)
    assert torch.equal(bound.rows, elbo.rows) and bound.value == pytest.approx(elbo.value, abs=1e-12)
    assert math.isnan(bound.se) and bound.rows_se.isnan().all() and math.isnan(bound.bias)


def takes_log_weights(value):
    return inspect.isfunction(value) and [p.annotation for p in inspect.signature(value).parameters.values()] == [
        HasLogWeights
    ]


# Every function of log weights alone in the room, but the check that all of them begin with.
ESTIMATORS = {
    name: value
    for name, value in names_in(estimators).items()
    if takes_log_weights(value) and value is not check_log_weights
}


def numbers(result):
    """What an estimate says of every row: ``[B]``."""
    return result if isinstance(result, torch.Tensor) else result.rows


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]


def test_the_public_estimators_are_found():
    assert {"elbo", "ess", "iwelbo", "khat"} <= set(ESTIMATORS)


def test_a_row_is_a_row_alone(estimator):
    given = gaussian(1.2, 400, rows=3)
    alone = [numbers(estimator(weights(given.local[:, [row]]))) for row in range(3)]
    torch.testing.assert_close(torch.cat(alone), numbers(estimator(given)))
    assert numbers(estimator(given)).shape == (3,)


def test_the_order_of_the_draws_says_nothing(estimator):
    given = gaussian(1.2, 400, rows=3)
    torch.testing.assert_close(numbers(estimator(weights(given.local.flip(0)))), numbers(estimator(given)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(estimator, bad):
    local = gaussian(1.2, 30, rows=3).local.clone()
    local[4, 1] = bad
    with pytest.raises(ValueError):
        estimator(weights(local))


def test_estimators_read_what_they_say_of_log_weights(estimator):
    given = gaussian(1.2, 30, rows=3)
    names = [name for name, value in vars(HasLogWeights).items() if isinstance(value, property)]
    read = estimator(SimpleNamespace(**{name: getattr(given, name) for name in names}))
    expected = estimator(given)
    assert torch.equal(numbers(read), numbers(expected))
    with pytest.raises(AttributeError):
        estimator(SimpleNamespace(**{name: getattr(given, name) for name in names if name != "local"}))


@pytest.mark.parametrize("reduce", [avi.elbo, avi.iwelbo])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_mean_per_row_is_that_of_the_rows(reduce, scale):
    draws = torch.randn(40, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    estimate = reduce(weights(draws, scale=scale))
    mean = estimate.per_row
    # Whatever a row of a minibatch stands for.
    assert mean.value == pytest.approx(estimate.rows.mean().item())
    assert (mean.se, mean.bias) == (pytest.approx(estimate.se / 5 / scale), pytest.approx(estimate.bias / 5 / scale))
    assert mean == pytest.approx(tuple(reduce(weights(draws)).per_row))


def test_an_index_has_no_mean_per_row():
    with pytest.raises(AttributeError, match="no mean per row"):
        avi.khat(gaussian(1.3, 50, rows=3)).per_row  # noqa: B018


def test_equal_weights_are_exact():
    same = weights(torch.tensor([-700.0, 3.0]).expand(50, 2))
    bound = avi.iwelbo(same)
    torch.testing.assert_close(bound.rows, same.local[0], rtol=0.0, atol=1e-12)
    assert bound.se < 1e-12 and abs(bound.bias) < 1e-12
    torch.testing.assert_close(avi.ess(same), torch.full((2,), 50.0).double())
    index = avi.khat(same)
    assert (index.rows == -math.inf).all() and not index.unreliable.any()


def test_a_factor_of_the_weights_moves_the_bound_alone():
    one = gaussian(1.3, 200, rows=3)
    two = weights(one.local + torch.tensor([5.0, -1000.0, 900.0]).double())
    a, b = avi.iwelbo(one), avi.iwelbo(two)
    torch.testing.assert_close(b.rows - a.rows, torch.tensor([5.0, -1000.0, 900.0]).double())
    torch.testing.assert_close(a.rows_se, b.rows_se)
    torch.testing.assert_close(avi.ess(one), avi.ess(two))
    torch.testing.assert_close(avi.khat(one).rows, avi.khat(two).rows)


def test_the_bound_lies_above_the_elbo_and_its_bias_below_zero():
    w = gaussian(0.8, 101, rows=20)
    bound = avi.iwelbo(w)
    assert (bound.rows >= avi.elbo(w).rows).all() and (bound.rows_bias <= 0).all()
    assert bound.value == pytest.approx(bound.rows.sum().item())
    assert bound.bias == pytest.approx(bound.rows_bias.sum().item())


def test_weights_of_zero_are_weights():
    half = weights([[math.log(3.0)], [-math.inf]])
    assert avi.iwelbo(half).value == pytest.approx(math.log(1.5)) and avi.ess(half).tolist() == [1.0]
    w = gaussian(0.7, 400)
    w.local[::2] = -math.inf
    assert avi.khat(w).rows.isfinite().all()


def test_rows_that_share_latents_have_a_joint_bound():
    local, global_ = torch.randn(30, 4).double(), torch.randn(30).double()
    joint = avi.iwelbo(weights(local, global_=global_, has_globals=True))
    assert joint.value == pytest.approx(math.log((global_ + local.sum(1)).exp().mean()))
    apart = avi.iwelbo(weights(local, global_=torch.full((30,), 0.5).double()))
    assert apart.value == pytest.approx(0.5 + local.exp().mean(0).log().sum().item())
    assert torch.equal(joint.rows, apart.rows)


def test_rows_of_a_minibatch_stand_for_others():
    part = avi.iwelbo(weights(torch.randn(30, 4), scale=5.0))
    assert part.value == pytest.approx(5 * part.rows.sum().item())


# --- known moments


def moment(stretch):
    """E[w^2] / E[w]^2 of `gaussian`."""
    return stretch**2 / math.sqrt(2 * stretch**2 - 1)


@pytest.mark.parametrize("stretch", [0.85, 1.0, 1.5])
def test_the_bound_reaches_the_evidence(stretch):
    w = gaussian(stretch, 4000, rows=50, log_evidence=-3.0)
    bound = avi.iwelbo(w)
    assert bound.se < 0.2
    assert abs(bound.value - bound.bias + 150.0) <= 5 * bound.se + 1e-9
    # Rows an evidence of 0.03 away would be seen.
    assert abs(bound.value + 150.0 + 50 * 0.03) > 5 * bound.se


def test_standard_error_bias_and_effective_size_are_those_of_the_weights():
    draws, rows = 50, 40000
    w = gaussian(1.5, draws, rows)
    bound, excess = avi.iwelbo(w), moment(1.5) - 1
    # Of a row, against what rows differ by, the formula, and the mean of the error.
    assert bound.rows.std().item() == pytest.approx((excess / draws) ** 0.5, rel=0.05)
    assert bound.rows_se.mean().item() == pytest.approx(bound.rows.std().item(), rel=0.05)
    assert bound.se == pytest.approx((rows * excess / draws) ** 0.5, rel=0.25)
    error = bound.rows.std() / rows**0.5
    assert (bound.rows.mean() + excess / (2 * draws)).abs() < 5 * error + 1e-4 < excess / (2 * draws)
    assert bound.rows_bias.mean().item() == pytest.approx(-excess / (2 * draws), rel=0.1)
    assert avi.ess(w).mean().item() / draws == pytest.approx(1 / moment(1.5), rel=0.02)


def linear(x, index=None):
    """z_n ~ N(0, 1), x_n ~ N(z_n, 1), a minibatch of 40 rows."""
    with pyro.plate("data", 40, subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def shared(x):
    """theta ~ N(0, 1), z_n ~ N(0, 1), x_n ~ N(theta + z_n, 1)."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)


def test_models_say_whether_rows_share_latents():
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)
    index = torch.arange(0, 40, 4)
    guide = avi.ConstantGuide(linear, init_scale=0.8).setup(x)
    alone = avi.log_weights(linear, guide, x[index], index, num_samples=500)
    bound = avi.iwelbo(alone)
    exact = 4 * dist.Normal(0.0, 2**0.5).log_prob(x[index]).sum().item()
    assert not alone.has_globals and alone.scale == 4.0
    assert abs(bound.value - bound.bias - exact) < 5 * bound.se < 0.05 * abs(exact)
    guide = avi.ConstantGuide(shared, init_scale=0.8).setup(x[:3])
    together = avi.log_weights(shared, guide, x[:3], num_samples=700)
    bound = avi.iwelbo(together)
    covariance = torch.ones(3, 3).double() + 2 * torch.eye(3).double()
    exact = dist.MultivariateNormal(torch.zeros(3).double(), covariance).log_prob(x[:3]).item()
    assert together.has_globals
    assert abs(bound.value - bound.bias - exact) < 5 * bound.se < 0.6
    # Twin: rows taken for independent.
    assert abs(avi.iwelbo(weights(together.local, global_=together.global_)).value - exact) > 5 * bound.se


# --- known tails


@pytest.mark.parametrize("k", [-0.4, 0.2, 0.7, 1.3])
def test_the_index_of_exact_pareto_tails(k):
    draws, rows = 2000, 800
    length = math.ceil(3 * draws**0.5)

    def pareto(u):
        return torch.expm1(-k * u.log()).div(k).add(1.0).log()

    # What is above a threshold is a generalized Pareto distribution of the same index; ten draws' weight is at 1/2.
    expected = (k * length + 5) / (length + 10)
    index = avi.khat(weights(pareto(torch.rand(draws, rows, dtype=torch.float64))))
    error = index.rows.std() / rows**0.5
    assert 5 * error < 0.035
    assert (index.rows.mean() - expected).abs() < 5 * error + 0.015
    assert index.rows_se.mean().item() == pytest.approx(index.rows.std().item(), rel=0.4)
    # Twins: tails that are a little lighter or heavier, and the other sign.
    assert (index.rows.mean() - expected).abs() < 0.1
    assert (avi.khat(weights(-pareto(torch.rand(draws, 1).double()))).rows - expected).abs() > 0.1
    quantiles = (torch.arange(draws).double() + 0.5) / draws
    assert avi.khat(weights(pareto(quantiles)[:, None])).value == pytest.approx(expected, abs=0.05)


def test_a_guide_too_narrow_by_a_factor_has_the_index_of_what_it_lacks():
    # w = exp((1 - s^2) e^2 / 2), so P(w > t) falls as t^(-1 / (1 - s^2)), with a logarithm that slows it.
    for stretch in (0.9, 0.6, 0.4):
        index = avi.khat(gaussian(stretch, 20000, rows=20))
        assert index.rows.mean().item() == pytest.approx(1 - stretch**2, abs=0.12)
    assert avi.khat(gaussian(0.4, 20000)).unreliable.all() and not avi.khat(gaussian(0.9, 20000)).unreliable.any()


@pytest.mark.parametrize("draws", [25, 100, 999, 5000])
def test_arviz_finds_the_same(draws):
    local = torch.randn(draws, 6).double() * torch.tensor([0.01, 0.3, 1.0, 2.0, 5.0, 50.0]).double() - 800.0
    # ArviZ 0.23 takes log weights; ArviZ 1 takes their negative.
    expected = torch.as_tensor(az.psislw(local.T.numpy())[1])
    index = avi.khat(weights(local))
    torch.testing.assert_close(index.rows, expected, rtol=1e-6, atol=1e-6)
    assert index.value == index.rows.max() and index.num_samples == draws
    assert index.threshold == min(1 - 1 / math.log10(draws), 0.7)
    torch.testing.assert_close(index.ess, avi.ess(weights(local)))


def test_weights_that_differ_by_rounding_have_no_tail():
    local = 5.0 + 1e-8 * torch.randn(4000, 2).double()
    assert not avi.khat(weights(local)).unreliable.any()


# --- errors

BAD = {
    "nan": torch.tensor([[0.0, 1.0], [0.0, math.nan]]).repeat(20, 1),
    "infinite": torch.tensor([[0.0, 1.0], [0.0, math.inf]]).repeat(20, 1),
    "no weight at all": torch.tensor([[0.0, -math.inf]]).repeat(40, 1),
}


@pytest.mark.parametrize("estimator", [avi.elbo, avi.iwelbo, avi.ess, avi.khat])
@pytest.mark.parametrize("what", BAD)
def test_rows_without_a_number_are_named(estimator, what):
    with pytest.raises(ValueError, match=r"(?s)got rows \[1\] \(1 of 2\) whose weights are.*Look at these rows"):
        estimator(weights(BAD[what]))


@pytest.mark.parametrize("estimator", [avi.elbo, avi.iwelbo, avi.ess, avi.khat])
def test_no_draws_are_refused(estimator):
    with pytest.raises(ValueError, match=r"shape \[S, B\] with S of at least 1, got \(0, 3\)"):
        estimator(weights(torch.zeros(0, 3)))


def test_a_tail_needs_draws():
    with pytest.raises(ValueError, match="Expected at least 25 draws, of which a fifth is the tail, got 24"):
        avi.khat(weights(torch.randn(24, 2)))


def test_a_minibatch_has_no_joint_bound():
    with pytest.raises(ValueError, match="(?s)a row counts 5 times.*pass all rows"):
        avi.iwelbo(weights(torch.randn(9, 2), scale=5.0, has_globals=True))
