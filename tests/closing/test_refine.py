"""Refinement: exact on a conjugate model, at no cost to guide, model and program."""

import copy
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_avi as avi
from pyro_avi.closing.natural_steps import NaturalSteps
from pyro_avi.closing.take_steps import take_steps

# z_n ~ N(0, 1), x_n ~ N(theta + TAU z_n, SIGMA^2), theta ~ N(0, 2^2)
TAU, SIGMA, THETA, N = 0.4, 1.0, 0.4, 8
X = torch.linspace(-4.0, 5.0, N, dtype=torch.float64)
SD = SIGMA / math.hypot(TAU, SIGMA)

GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": partial(avi.AmortizedGuide, encoder=(4,), inputs=lambda x: x[:, None]),
    "factorized": avi.FactorizedGuide,
}


def model(x):
    zero = x.new_zeros(())
    theta = pyro.sample("theta", dist.Normal(zero, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("x", dist.Normal(theta + TAU * z, SIGMA), obs=x)


def posterior_mean(x):
    """The best means of the rows' factors at any factor of theta with mean THETA."""
    return TAU * (x - THETA) / (TAU**2 + SIGMA**2)


def make(guide):
    guide = GUIDES[guide](model).setup(X)
    with torch.no_grad():
        guide.global_guide.vector.copy_(torch.tensor([THETA, math.log(0.1)]))
        for parameter in guide.local_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return guide


def images(guide="amortized", rows=6):
    likelihood = avi.models.GaussianLikelihood(0.3, learned=True)
    vae = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 3, 3)), size=rows, likelihood=likelihood)
    guide = {"amortized": partial(avi.AmortizedGuide, encoder=(4,))}.get(guide, GUIDES[guide])(vae)
    return vae, guide.setup(torch.rand(rows, 1, 3, 3))


def assert_exact(refined, x):
    loc, log_scale = refined.table.detach().chunk(2, -1)
    assert (loc[:, 0] - posterior_mean(x)).abs().max() < 0.05 * SD
    assert (log_scale.exp() - SD).abs().max() < 0.05 * SD


@pytest.mark.parametrize(
    ("guide", "held_out"), [("constant", False), ("amortized", False), ("factorized", False), ("factorized", True)]
)
def test_every_row_reaches_its_best_factor(guide, held_out):
    guide = make(guide)
    x = torch.tensor([2.5, -1.0, 0.1], dtype=torch.float64) if held_out else X
    start = avi.refine(model, guide, x, num_steps=1, lr=0.0).table
    assert (start[:, 0] - posterior_mean(x)).abs().max() > 0.5 * SD
    refined = avi.refine(model, guide, x, num_steps=400)
    assert isinstance(refined, avi.FactorizedGuide) and len(refined.table) == len(x)
    assert_exact(refined, x)


def test_it_starts_at_the_guides_own_output_or_where_it_is_told():
    def start(guide, x, **options):
        return avi.refine(model, guide, x, num_steps=1, lr=0.0, **options).table.detach()

    x = X[:3]
    for name in ("constant", "amortized"):
        guide = make(name)
        assert torch.equal(start(guide, x), guide.variational_parameters(x))
    guide = make("factorized")
    mean = guide.table.mean(0).expand(3, 2)
    torch.testing.assert_close(start(guide, x), mean, rtol=0.0, atol=0.0)
    assert torch.equal(start(guide, X, start=guide.table), guide.table)
    given = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(start(guide, x, start=given), given)
    assert torch.equal(start(guide, x, start=given[0]), given[0].expand(3, 2))


def test_a_row_that_its_steps_made_worse_keeps_its_start():
    guide = avi.FactorizedGuide(model).setup(X)
    best = torch.stack([posterior_mean(X), torch.full_like(X, math.log(SD))], 1)
    start = best.clone()
    start[::2, 0] += 3 * SD
    # One step, far too large: worse for the rows that were at their best.
    rate = {0: 2.0}
    refined = avi.refine(model, guide, X, num_steps=20, lr=lambda step: rate.get(step, 0.0), start=start).table.detach()
    assert torch.equal(refined[1::2], start[1::2])
    taken = (refined != start).any(1)
    assert taken[::2].any() and (refined[taken, 0] < start[taken, 0]).all()


def test_the_learning_rate_is_a_number_or_as_told():
    guide = make("constant")

    def table(**options):
        return avi.refine(model, guide, X[:3], num_steps=8, **options).table

    assert torch.equal(table(lr=0.1), table(lr=lambda step: 0.1))
    assert not torch.equal(table(lr=0.1), table(lr=lambda step: 0.1 / (step + 1)))


def test_the_result_is_the_mean_of_the_second_half():
    guide = make("constant")
    refined, tables = avi.FactorizedGuide(model, global_guide=copy.deepcopy(guide.global_guide)).setup(X), []
    with torch.no_grad():
        refined.table.copy_(guide.variational_parameters(X))
    fisher = {id(refined.table): avi.DiagonalNormal().fisher}
    options = {"elbo": avi.StickingTheLandingELBO(num_particles=2), "optimizer": partial(NaturalSteps, fisher=fisher)}
    options |= {"lr": {"local": 0.2}, "callbacks": [lambda fit: tables.append(refined.table.detach().clone())]}
    avi.fit(model, refined, X, num_steps=9, progress=False, **options)
    torch.testing.assert_close(
        avi.refine(model, guide, X, num_steps=9).table.detach(), torch.stack(tables[4:]).mean(0), rtol=0.0, atol=1e-12
    )


def test_the_mean_has_less_noise_than_its_last_step():
    # Started at its best, a table only loses by the noise of its steps: the mean keeps a third of that, and less.
    loadings = torch.randn(20, 4, dtype=torch.float64) / 2
    factors = avi.models.FactorAnalysis(loadings, 0.5, size=60)
    x = factors().detach()
    precision = torch.eye(4) + loadings.T @ loadings / 0.25
    means = torch.linalg.solve(precision, loadings.T @ x.T / 0.25).T
    best = torch.cat([means, -0.5 * precision.diagonal().log().expand(60, 4)], 1)

    def loss(table):
        shift, stretch = (table.detach() - best).chunk(2, -1)
        return (0.5 * ((shift @ precision) * shift).sum(1) + (0.5 * torch.expm1(2 * stretch) - stretch).sum(1)).mean()

    guide, last = avi.FactorizedGuide(factors).setup(x), []
    with torch.no_grad():
        guide.table.copy_(best)
    moved = copy.deepcopy(guide)
    take_steps(factors, moved, (x,), {}, num_steps=200, lr=0.05, seed=0)
    mean = loss(moved.table)
    options = {"num_steps": 200, "lr": {"local": 0.05}, "elbo": TraceMeanField_ELBO(), "progress": False}
    avi.fit(factors, guide, x, callbacks=[lambda fit: last.append(loss(guide.table))], **options)
    assert 0 < mean < 0.3 * torch.stack(last[-20:]).mean()


def test_the_seed_decides():
    guide = make("constant")
    one, again, other = (avi.refine(model, guide, X, num_steps=5, seed=seed).table for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)


def snapshot(*modules):
    return [
        (name, value.detach().clone(), value.requires_grad, value.grad)
        for module in modules
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    ]


@pytest.mark.parametrize("guide", GUIDES)
def test_model_guide_and_program_are_left_as_they_are(guide):
    vae, guide = images(guide)
    next(vae.parameters()).requires_grad_(False)
    vae.eval()
    before, random_state = snapshot(vae, guide), torch.get_rng_state()
    refined = avi.refine(vae, guide, torch.rand(4, 1, 3, 3, generator=torch.Generator()), num_steps=5)
    after = snapshot(vae, guide)
    assert torch.equal(random_state, torch.get_rng_state()) and not set(pyro.get_param_store())
    assert [name for name, *_ in before] == [name for name, *_ in after]
    for (_, value, requires, grad), (_, now, requires_now, grad_now) in zip(before, after, strict=True):
        assert torch.equal(value, now) and requires is requires_now and grad is None and grad_now is None
    assert not set(map(id, guide.parameters())) & set(map(id, refined.parameters()))


def test_the_factor_of_the_globals_is_a_copy_that_stays():
    guide = make("amortized")
    refined = avi.refine(model, guide, X[:3], num_steps=5)
    assert torch.equal(refined.global_guide.vector, guide.global_guide.vector)
    before = snapshot(guide)
    avi.fit(model, refined, X[:3], num_steps=3, progress=False)
    assert not torch.equal(refined.global_guide.vector, guide.global_guide.vector)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(before, snapshot(guide), strict=True))


def test_no_row_is_worse_off():
    vae, guide = images()
    x = torch.rand(6, 1, 3, 3)
    avi.fit(vae, guide, x, num_steps=50, lr=0.02, progress=False)

    def rows(guide):
        local = avi.log_weights(vae, guide, x, num_samples=200).local
        return local.mean(0), local.std(0) / 200**0.5

    (before, se), (after, se_after) = rows(guide), rows(avi.refine(vae, guide, x, num_steps=150))
    gain, se = after - before, torch.hypot(se, se_after)
    assert (gain > -5 * se).all()
    # And it is worth while: one encoder of four units does not fit all rows.
    assert gain.sum() > 5 * se.norm()


@pytest.mark.parametrize("guide", GUIDES)
def test_a_copy_that_is_trained_does_not_move_the_original(guide):
    guide = make(guide)
    other = copy.deepcopy(guide)
    before = snapshot(guide)
    avi.fit(model, other, X, num_steps=3, progress=False)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(before, snapshot(guide), strict=True))
    trained = snapshot(other)
    assert not any(torch.equal(one[1], two[1]) for one, two in zip(before, trained, strict=True))
    avi.fit(model, guide, X, num_steps=3, progress=False)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(trained, snapshot(guide), strict=True))
    refined, refined_copy = (avi.refine(model, each, X, num_steps=3) for each in (guide, other))
    assert torch.equal(refined.table, refined_copy.table)


# --- errors


def test_a_guide_for_other_latents_is_refused():
    def other(x):
        theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), 2.0))
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(theta + w, SIGMA), obs=x)

    with pytest.raises(ValueError, match=r"latents \[\['w'\]\] of the model's rows, got one for \[\['z'\]\]"):
        avi.refine(other, make("constant"), X, num_steps=1)


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_that_was_never_set_up_is_refused(guide):
    with pytest.raises(ValueError, match="(?s)Expected a .*Guide with parameters.*guide.setup"):
        avi.refine(model, GUIDES[guide](model), X, num_steps=1)


def test_a_guide_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="Expected a ConstantGuide, .* or FactorizedGuide, got AutoNormal"):
        avi.refine(model, AutoNormal(model), X, num_steps=1)


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3,), (), (1, 3, 2)])
def test_a_start_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"Expected start of shape \(3, 2\), one row for each row to refine, got"):
        avi.refine(model, make("constant"), X[:3], num_steps=1, start=torch.zeros(shape))


def test_a_minibatch_is_no_data_set():
    vae, guide = images()
    with pytest.raises(ValueError, match="Expected all 6 rows of 'data', got 2 of them.\nPass the rows to refine"):
        avi.refine(vae, guide, torch.rand(2, 1, 3, 3), torch.tensor([3, 1]), num_steps=1)
    for start in (torch.zeros(2), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="Expected all 6 rows of 'data', got 2 of them.\nPass the rows to refine"):
            avi.refine(vae, guide, torch.rand(2, 1, 3, 3), torch.tensor([3, 1]), num_steps=1, start=start)


# --- where it starts, what it keeps


def two_modes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), 0.5), obs=x)


def test_a_table_answers_for_its_own_rows_and_the_mean_for_others():
    guide = make("factorized")

    def start(x):
        return avi.refine(model, guide, x, num_steps=1, lr=0.0).table.detach()

    assert torch.equal(start(X), guide.table)
    # As many rows, but others; and fewer.
    for x in (X + 1, X[:3]):
        torch.testing.assert_close(start(x), guide.table.mean(0).expand(len(x), 2), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("steps", [1, 5])
def test_rows_at_their_best_in_one_of_two_modes_lose_nothing(steps):
    x = torch.linspace(1.0, 4.0, 20, dtype=torch.float64)
    guide = avi.FactorizedGuide(two_modes).setup(x)
    with torch.no_grad():
        guide.table.copy_(torch.stack([x.sqrt(), torch.full_like(x, -1.5)], 1))
    avi.fit(two_modes, guide, x, num_steps=300, lr=0.02, elbo=avi.StickingTheLandingELBO(), progress=False)
    refined = avi.refine(two_modes, guide, x, num_steps=steps)

    def rows(guide):
        torch.manual_seed(7)
        return avi.log_weights(two_modes, guide, x, num_samples=500, seed=7).local

    gain = (rows(refined) - rows(guide)).sum(1)
    assert gain.mean() >= -2 * gain.std() / 500**0.5
    # Twin: the steps themselves lose.
    moved = copy.deepcopy(guide)
    take_steps(two_modes, moved, (x,), {}, num_steps=steps, lr=0.5, seed=0)
    lost = (rows(moved) - rows(guide)).sum(1)
    assert lost.mean() < -3 * lost.std() / 500**0.5


def test_rows_that_a_factor_ties_gain_together():
    def tied(x):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)
        pyro.sample("pair", dist.Normal(z[0] - z[1], 0.1), obs=x.new_zeros(()))

    x = torch.tensor([2.0, -2.0, 1.0, 0.0], dtype=torch.float64)
    guide = avi.FactorizedGuide(tied).setup(x)
    with torch.no_grad():
        guide.table.copy_(torch.tensor([[1.0, -1.0]]).expand(4, 2))
    refined = avi.refine(tied, guide, x, num_steps=100)
    before, after = (avi.elbo(avi.log_weights(tied, each, x, num_samples=200)) for each in (guide, refined))
    assert after.value - before.value > 5 * math.hypot(before.se, after.se)


def test_shares_of_the_learning_rate_move_rows_by_as_much():
    guide = make("factorized")
    tables = []
    for share in (0.0, 0.5, 1.0):
        moved = copy.deepcopy(guide)
        take_steps(model, moved, (X,), {}, num_steps=1, lr=0.1, seed=0, shares={"data": torch.full((N, 1), share)})
        tables.append(moved.table.detach() - guide.table.detach())
    assert torch.equal(tables[0], torch.zeros_like(tables[0]))
    torch.testing.assert_close(tables[1], 0.5 * tables[2])


# --- discrete latents

WEIGHTS, LOCS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), torch.tensor([-3.0, 0.0, 4.5], dtype=torch.float64)


def labelled(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(LOCS[k] + z, 1.0), obs=x)


def test_factors_of_discrete_latents_are_refined_without_noise():
    x = torch.tensor([-4.0, -3.8, 0.2, 5.0], dtype=torch.float64)
    guide = avi.ConstantGuide(labelled).setup(x)
    refined = avi.refine(labelled, guide, x, num_steps=200)
    evidence = (WEIGHTS.log() + dist.Normal(LOCS, 2**0.5).log_prob(x[:, None])).logsumexp(1)
    before, after = (avi.elbo(avi.log_weights(labelled, each, x, num_samples=500)) for each in (guide, refined))
    assert ((after.rows - before.rows) > 5 * torch.hypot(before.rows_se, after.rows_se)).all()
    # Rows of one label, nearly: then the factors hold the posterior.
    assert (evidence - after.rows).abs().max() < 0.35
