"""The gradient of the path alone: zero in every draw at the posterior, and of the same mean everywhere."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_avi as avi

X = torch.linspace(-1.0, 2.0, 6, dtype=torch.double)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def positive(x):
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=2.0):
        z = pyro.sample("z", dist.LogNormal(torch.zeros_like(x), 1.0))
        pyro.sample("x", dist.LogNormal(z.log(), 0.5), obs=x.exp())


def at_the_posterior(program):
    """The posterior of either is N(4 x / 5, 1 / 5), the second one's on the log scale."""
    guide = avi.FactorizedGuide(program).setup(X)
    with torch.no_grad():
        guide.table.copy_(torch.stack([0.8 * X, torch.full_like(X, 0.2**0.5).log()], 1))
    return guide


def gradient(elbo, program, guide, seed=0):
    with pyro.get_param_store().scope():
        torch.manual_seed(seed)
        loss = elbo.differentiable_loss(program, guide, X)
        (grad,) = torch.autograd.grad(loss, [guide.table])
    return loss.detach(), grad


@pytest.mark.parametrize("program", [model, positive])
@pytest.mark.parametrize("particles", [{}, {"num_particles": 3}])
def test_zero_in_every_draw_at_the_posterior(program, particles):
    guide = at_the_posterior(program)
    loss, grad = gradient(avi.StickingTheLandingELBO(**particles), program, guide)
    assert grad.abs().max() < 1e-12
    # The twin: the usual gradient has the score, and the value is the same.
    usual, with_score = gradient(Trace_ELBO(**particles), program, guide)
    assert with_score.abs().max() > 0.1
    torch.testing.assert_close(loss, usual, rtol=1e-12, atol=1e-12)


def test_the_same_mean_elsewhere():
    """20 means of 400 draws of either: standard errors of the difference below .2, of gradients up to 8.

    The twin lacks the density's path as well, and is off by 1 in the log scales.
    """
    guide = avi.FactorizedGuide(model).setup(X)
    particles = {"num_particles": 400, "vectorize_particles": True}

    class NoEntropy(avi.StickingTheLandingELBO):
        def _differentiable_loss_particle(self, model_trace, guide_trace):
            loss, _ = super()._differentiable_loss_particle(model_trace, guide_trace)
            return loss, -model_trace.log_prob_sum()

    elbos = [avi.StickingTheLandingELBO(**particles), Trace_ELBO(**particles), NoEntropy(**particles)]
    one, two, wrong = (torch.stack([gradient(elbo, model, guide, seed)[1] for seed in range(20)]) for elbo in elbos)
    for other, same in ((two, True), (wrong, False)):
        difference = (one - other).mean(0)
        error = (one - other).std(0) / 20**0.5
        assert error.max() < 0.2 and one.mean(0).abs().max() > 5
        assert (difference.abs() < 5 * error + 1e-12).all().item() is same


def test_latents_that_are_not_reparameterized_keep_their_score():
    def counts(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(torch.ones_like(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        rate = pyro.param("rate", torch.ones_like(x))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(rate))

    grads = []
    for elbo in (avi.StickingTheLandingELBO(), Trace_ELBO()):
        with pyro.get_param_store().scope():
            torch.manual_seed(0)
            loss = elbo.differentiable_loss(counts, guide, X)
            grads.append(torch.autograd.grad(loss, [pyro.param("rate")])[0])
    torch.testing.assert_close(*grads)
