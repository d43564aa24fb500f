"""Refinement with a tolerance: only rows that need it are moved, and what is said to be left is."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from pyro_avi.closing.remaining_gain import GainOfSteps

N, K = 60, 4


def factors():
    """Factor analysis, its data, the best independent normals and what a table loses against them, in nats a row."""
    generator = torch.Generator().manual_seed(1)
    loadings = torch.randn(12, K, dtype=torch.double, generator=generator) / 2
    model = avi.models.FactorAnalysis(loadings, 0.7, size=N)
    x = torch.randn(N, K, dtype=torch.double, generator=generator) @ loadings.T
    x = x + 0.7 * torch.randn(N, 12, dtype=torch.double, generator=generator)
    precision = torch.eye(K, dtype=torch.double) + loadings.T @ loadings / 0.49
    means = torch.linalg.solve(precision, loadings.T @ x.T / 0.49).T
    scales = precision.diagonal().rsqrt()
    best = torch.cat([means, scales.log().expand(N, K)], 1)

    def lost(table):
        shift, stretch = (table.detach() - best).chunk(2, -1)
        return 0.5 * ((shift @ precision) * shift).sum(1) + (0.5 * torch.expm1(2 * stretch) - stretch).sum(1)

    return model, x, best, lost


def far(best, rows=slice(None)):
    start = best.clone()
    start[rows, 0] += 2.0
    start[rows, K] += 0.5
    return start


class Recorded:
    """A model with the numbers of rows of the calls that had a gradient."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def __call__(self, x):
        self.rows += [len(x)] * torch.is_grad_enabled()
        return self.model(x)


def test_without_a_row_that_is_done_it_takes_the_steps_of_refine():
    model, x, best, _ = factors()
    guide = avi.FactorizedGuide(model).setup(x)
    options = {"num_steps": 40, "start": far(best), "progress": False}
    plain, watched = (avi.refine(model, guide, x, tolerance=t, **options) for t in (None, 1e-9))
    assert (
        plain.refinement is None and (watched.refinement.steps == 40).all() and not watched.refinement.converged.any()
    )
    torch.testing.assert_close(watched.table, plain.table, rtol=0.0, atol=1e-9)


def simulate(answered, lr=0.2, steps=12, rows=4000):
    """The bias of the estimate, in standard errors, where F = 1 and -bound is |x|^2 / 2; gradients have a noise of 1."""
    torch.manual_seed(0)
    x, gain, visited = torch.full((rows, 3), 0.1, dtype=torch.double), GainOfSteps(), 0.0
    for _ in range(steps):
        gradients = x + torch.randn(2, rows, 3, dtype=torch.double)
        gain.add(gradients, torch.ones_like(x), lr)
        visited, x = visited + x / steps, x - lr * gradients.mean(0)
    found = gain.estimate()
    rows = found.rows if answered else found.rows - 0.5 * (1 - gain.decay) / steps * gain._noise.sum(-1) / steps
    error = rows - 0.5 * visited.square().sum(-1)
    spread = found.rows_se.square().mean().sqrt() / error.std()
    return (error.mean() / (error.std() / len(error) ** 0.5)).item(), spread.item()


def test_what_is_left_is_estimated_without_bias():
    bias, spread = simulate(answered=True)
    assert abs(bias) < 5 and 0.7 < spread < 1.5
    assert simulate(answered=False)[0] < -5


def from_the_start(corrected, lr=0.2, steps=12, rows=4000):
    """The bias and the mean standard error of the gain from the start, by steps that move away from it."""
    torch.manual_seed(0)
    start = torch.full((rows, 3), 0.3, dtype=torch.double)
    x, gain = start, GainOfSteps()
    for _ in range(steps):
        gradients = x + torch.randn(2, rows, 3, dtype=torch.double)
        gain.add(gradients - corrected * (x - start), torch.ones_like(x), 0.0)
        x = x - lr * gradients.mean(0)
    error = gain.estimate().rows - 0.5 * start.square().sum(-1)
    return (error.mean() / (error.std() / len(error) ** 0.5)).item(), gain.estimate().rows_se.mean().item()


def test_the_gain_from_the_start_is_known_as_if_no_step_had_moved():
    bias, error = from_the_start(corrected=1.0)
    assert abs(bias) < 5 and abs(from_the_start(corrected=0.0)[0]) > 5
    assert error == pytest.approx(from_the_start(corrected=1.0, lr=0.0)[1], rel=0.02)


def test_the_gradients_of_some_rows_are_theirs():
    torch.manual_seed(0)
    gradients, rows = torch.randn(4, 2, 5, 3, dtype=torch.double), torch.tensor([0, 3])
    whole, some = GainOfSteps(), GainOfSteps()
    for one in gradients:
        whole.add(one, torch.ones(5, 3), 0.2)
        some.add(one[:, rows], torch.ones(2, 3), 0.2)
    torch.testing.assert_close(whole.of(rows).estimate().rows, some.estimate().rows)
    torch.testing.assert_close(whole.of(rows).estimate().rows_se, whole.estimate().rows_se[rows])


def test_the_curvature_is_that_along_the_gradient_in_units_of_the_factors():
    fisher, curvature = torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0, 0.5]])
    gain = GainOfSteps()
    gain.add(torch.tensor([2.0, -1.0]).expand(2, 1, 2), fisher, 0.2)
    move = gain.move(fisher)
    torch.testing.assert_close(move / move[0, 0], torch.tensor([[1.0, -2.0]], dtype=torch.double))
    torch.testing.assert_close((move.square() * fisher).sum(), torch.tensor(0.01, dtype=torch.double))
    expected = torch.tensor([(0.25 * 1 + 1.0 * 0.5 * 1.0) / (0.25 * 4 + 1.0)], dtype=torch.double)
    found = GainOfSteps.curvature(torch.tensor([[0.5, -1.0]]), curvature * torch.tensor([[0.5, -1.0]]), fisher)
    torch.testing.assert_close(found, expected)


def test_factors_that_are_far_too_narrow_are_not_taken_for_converged():
    # In units of their own scale their gradients are small.
    model, x, best, lost = factors()
    start = best.clone()
    start[:, :K] += 0.3
    start[:, K:] -= 3.0
    guide = avi.FactorizedGuide(model).setup(x)
    refined = avi.refine(model, guide, x, num_steps=100, start=start, tolerance=0.5, progress=False)
    assert lost(start).min() > 5 and (lost(refined.table)[refined.refinement.converged] < 1.0).all()
    assert refined.refinement.converged.double().mean() > 0.9


def test_rows_near_their_best_keep_their_factors_and_are_not_evaluated():
    model, x, best, lost = factors()
    start = far(best, slice(0, 10))
    model = Recorded(model)
    guide = avi.FactorizedGuide(model).setup(x)
    model.rows.clear()
    refined = avi.refine(model, guide, x, num_steps=200, start=start, tolerance=0.3, progress=False)
    kept, result = (refined.table == start).all(1), refined.refinement
    assert kept[10:].double().mean() > 0.8 and not kept[:10].any()
    assert (lost(refined.table) <= lost(start) + 1e-12).double().mean() > 0.9 and lost(refined.table).max() < 0.3
    assert result.converged.double().mean() > 0.95
    assert result.steps[kept].double().mean() < 25 and (result.steps[:10] > 6).all()
    # Two draws a step, and few calls beside.
    assert sum(model.rows) < 0.25 * 2 * 200 * N


def test_rows_end_where_as_many_steps_of_all_rows_lead():
    model, x, best, lost = factors()
    guide = avi.FactorizedGuide(model).setup(x)
    refined = avi.refine(model, guide, x, num_steps=200, start=far(best), tolerance=0.1, progress=False)
    assert lost(refined.table).mean() < 0.1 < 0.05 * lost(far(best)).mean()
    assert refined.refinement.converged.double().mean() > 0.9 and (refined.refinement.steps < 200).double().mean() > 0.8


def test_a_model_that_has_no_call_for_some_rows_is_evaluated_for_all():
    model, x, best, lost = factors()

    def of_all():
        return model(x)

    guide = avi.FactorizedGuide(of_all).setup()
    start = far(best, slice(0, 10))
    refined = avi.refine(of_all, guide, num_steps=100, start=start, tolerance=0.2, progress=False)
    assert refined.refinement.converged.double().mean() > 0.9 and lost(refined.table).mean() < 0.05


def crossed(x):
    of_rows, of_columns = pyro.plate("rows", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1)
    with of_rows:
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
    with of_columns:
        b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
    with of_rows, of_columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)


def with_globals(x):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def with_classes(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Categorical(torch.ones(2)))
        pyro.sample("x", dist.Normal(4.0 * y - 2.0, 1.0), obs=x)


def without_rows(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_rows_of_several_plates_have_answers_by_plates():
    x = torch.randn(5, 4)
    guide = avi.FactorizedGuide(crossed, plate=("rows", "columns")).setup(x)
    found = avi.refine(crossed, guide, x, num_steps=40, tolerance=0.5, progress=False).refinement
    assert {plates: len(each.steps) for plates, each in found.items()} == {("rows",): 5, ("columns",): 4}
    assert all(each.converged.any() for each in found.values())


@pytest.mark.parametrize("model", [with_globals, with_classes])
def test_globals_and_discrete_latents(model):
    x = torch.linspace(-3.0, 3.0, 12)
    guide = avi.FactorizedGuide(model).setup(x)
    refined = avi.refine(model, guide, x, num_steps=50, tolerance=0.3, progress=False)
    plain = avi.refine(model, guide, x, num_steps=50, progress=False)
    assert refined.refinement.converged.any() and (refined.refinement.steps < 50).any()
    bounds = (
        avi.elbo(avi.log_weights(model, each, x, num_samples=100, seed=3, progress=False)) for each in (refined, plain)
    )
    assert next(bounds).value > next(bounds).value - 0.3 * len(x)


def test_a_call_without_rows_is_one_row():
    x = torch.tensor(3.0)
    with pytest.warns(UserWarning, match="no plate"):
        guide = avi.ConstantGuide(without_rows).setup(x)
    refined = avi.refine(without_rows, guide, x, num_steps=100, tolerance=0.1, progress=False)
    assert refined.refinement.converged.tolist() == [True] and refined.refinement.steps.shape == (1,)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, math.nan, math.inf, True, "0.1"])
def test_a_tolerance_is_a_positive_number(tolerance):
    model, x, _, _ = factors()
    guide = avi.FactorizedGuide(model).setup(x)
    with pytest.raises(ValueError, match="Expected tolerance to be a positive number of nats"):
        avi.refine(model, guide, x, num_steps=5, tolerance=tolerance)


def test_families_without_a_formula_are_refused():
    model, x, _, _ = factors()
    guide = avi.FactorizedGuide(model, family=avi.LowRankNormal(rank=1)).setup(x)
    with pytest.raises(ValueError, match="Expected a family with a formula of its Fisher information.*LowRankNormal"):
        avi.refine(model, guide, x, num_steps=5, tolerance=0.1)
