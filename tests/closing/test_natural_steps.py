"""Natural steps: their formula, and what the diagonal of the Fisher information of each family is."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_avi as avi
from pyro_avi.closing.natural_steps import NaturalSteps
from pyro_avi.closing.take_steps import take_steps
from tests.families.test_families import FAMILIES, prepare, random


def steps(table, gradients, **options):
    table = table.clone().requires_grad_()
    optimizer = NaturalSteps([table], fisher={id(table): lambda values: torch.full_like(values, 4.0)}, **options)
    for gradient in gradients:
        table.grad = gradient
        optimizer.step()
    return table.detach()


def test_a_step_is_the_gradient_in_units_of_the_information():
    table, gradient = torch.zeros(2, 2), torch.tensor([[0.4, -0.8], [0.0, 0.04]])
    torch.testing.assert_close(steps(table, [gradient], lr=0.5), -0.5 * gradient / 4)
    torch.testing.assert_close(steps(table, 3 * [gradient], lr=0.5), -1.5 * gradient / 4)


def test_no_parameter_moves_by_more_than_a_share_of_its_scale():
    moved = steps(torch.zeros(1, 2), [torch.tensor([[1e6, -0.1]])], lr=1.0, clip=0.3)
    torch.testing.assert_close(moved, torch.tensor([[-0.3 / 2, 0.025]]))


def test_a_normal_of_the_right_scale_ends_at_its_optimum_in_one_step():
    # -log p = (z - a)^2 / (2 s^2): the natural gradient of the mean of q = N(m, s^2) is m - a, whatever s.
    for scale in (1e-3, 1.0, 50.0):
        table = torch.tensor([[3.0 * scale]], dtype=torch.double, requires_grad=True)
        optimizer = NaturalSteps(
            [table], lr=1.0, fisher={id(table): lambda x, s=scale: torch.full_like(x, s**-2)}, clip=9.0
        )
        table.grad = (table.detach() - 1.5 * scale) / scale**2
        optimizer.step()
        torch.testing.assert_close(table.detach(), torch.tensor([[1.5 * scale]], dtype=torch.double))


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_information_is_the_curvature_of_the_divergence(kind):
    family = prepare(kind, 3)
    parameters = random(family, 3)
    fisher = family.fisher(parameters)
    if fisher is None:
        return
    assert fisher.shape == parameters.shape and (fisher >= 0).all()
    for p in range(parameters.shape[1]):
        move = torch.zeros_like(parameters)
        move[:, p] = 1e-3
        q = family.distribution(parameters)
        both = [kl_divergence(q, family.distribution(parameters + sign * move)) for sign in (1, -1)]
        torch.testing.assert_close(fisher[:, p], sum(both) / 1e-6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lr", [0.2, lambda step: 0.2 / (1 + step)])
def test_families_without_a_formula_are_moved_by_adam(lr):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    x = torch.randn(4, 2)
    guide = avi.ConstantGuide(model, family=avi.LowRankNormal(rank=1)).setup(x)
    options = {"elbo": avi.StickingTheLandingELBO(num_particles=2), "optimizer": torch.optim.Adam, "progress": False}
    table = avi.FactorizedGuide(model, family=avi.LowRankNormal(rank=1)).setup(x)
    with torch.no_grad():
        table.table.copy_(guide.variational_parameters(x))
    moved = copy.deepcopy(table)
    take_steps(model, moved, (x,), {}, num_steps=1, lr=lr, seed=3)
    avi.fit(model, table, x, num_steps=1, lr={"local": 0.05}, seed=3, **options)
    torch.testing.assert_close(moved.table, table.table, rtol=0.0, atol=1e-7)
    assert (moved.table - guide.variational_parameters(x)).abs().max() > 0.01


def test_the_information_of_a_factor_has_that_of_its_discrete_latents():
    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(y.to(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = avi.FactorizedGuide(model, family=avi.Conditional(avi.DiagonalNormal())).setup(torch.randn(4))
    table = torch.randn(4, 9)
    fisher = guide.row_factors[0].factor.fisher(table)
    probs = table[:, 6:].softmax(-1)
    torch.testing.assert_close(fisher[:, 6:], probs * (1 - probs))
    torch.testing.assert_close(fisher[:, [0, 2, 4]], torch.exp(-2 * table[:, [1, 3, 5]]))
    assert (fisher[:, [1, 3, 5]] == 2).all()
