"""Trained guides against what is known: closed forms of a linear model, the mean image, the order of the guides."""

import copy
import math

import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch import nn

import pyro_avi as avi
from experiments import datasets


def falling(lr, steps):
    return lambda step: lr * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model, guide, x, *, lr, steps, parts=("local", "global")):
    rates = {part: falling(lr, steps) for part in parts}
    avi.fit(model, guide, x, num_steps=steps, lr=rates, elbo=TraceMeanField_ELBO(), progress=False)


# --- a linear decoder of known weights (probabilistic principal components): the posteriors are known


class Linear:
    """x_n ~ N(W z_n + b, sigma^2 I) with its posterior N(means_n, inverse of precision) and its evidence."""

    def __init__(self, rows=20, latents=2, pixels=6, sigma=0.6):
        torch.manual_seed(0)
        decoder = avi.models.DenseDecoder(latents, (), (pixels,)).double()
        layer = decoder.layers[0]
        nn.init.normal_(layer.weight, std=0.5)
        likelihood = avi.models.GaussianLikelihood(sigma)
        self.model = avi.models.VAE(decoder, size=rows, likelihood=likelihood).double()
        with torch.no_grad():
            self.x = self.model()
            weight, variance = layer.weight, likelihood.scale**2
            self.precision = torch.eye(latents).double() + weight.T @ weight / variance
            self.means = torch.linalg.solve(self.precision, weight.T @ (self.x - layer.bias).T / variance).T
            covariance = weight @ weight.T + variance * torch.eye(pixels).double()
            self.evidence = torch.distributions.MultivariateNormal(layer.bias, covariance).log_prob(self.x)

    def divergence(self, parameters):
        """KL(q_n | posterior of row n), nats a row, of diagonal normals with these parameters."""
        loc, log_scale = parameters.chunk(2, -1)
        deviation = loc - self.means
        trace = (self.precision.diagonal() * (2 * log_scale).exp()).sum(-1)
        distance = (deviation @ self.precision * deviation).sum(-1)
        entropies = (1 + 2 * log_scale).sum(-1) + self.precision.logdet()
        return 0.5 * (trace + distance - entropies)

    def least(self):
        """The divergence of the best diagonal normal: it has the posterior's mean and its conditional variances."""
        return 0.5 * (self.precision.diagonal().log().sum() - self.precision.logdet())


@pytest.fixture(scope="module")
def linear():
    with torch.random.fork_rng():
        yield Linear()


@pytest.mark.parametrize("guide", ["constant", "amortized", "factorized"])
def test_guides_of_a_linear_model_reach_their_closed_forms(linear, guide):
    make = {
        "constant": avi.ConstantGuide,
        # The posterior mean is linear in the row: a head without an encoder can give it.
        "amortized": lambda model: avi.AmortizedGuide(model, encoder=nn.Identity()),
        "factorized": avi.FactorizedGuide,
    }[guide]
    guide_of_rows = make(linear.model).setup(linear.x)
    train(linear.model, guide_of_rows, linear.x, lr=0.05, steps=1000, parts=["local"])
    parameters = guide_of_rows.variational_parameters(linear.x).detach()
    divergence = linear.divergence(parameters)
    best = linear.least().expand(len(linear.x))
    if guide == "constant":
        # One mean for all rows: the mean of theirs.
        deviation = linear.means - linear.means.mean(0)
        best = best + 0.5 * (deviation @ linear.precision * deviation).sum(-1)
        assert (best.mean() - linear.least()) > 0.5
        assert divergence.mean() - best.mean() < 0.01
    else:
        assert (divergence - best).max() < 0.02
    assert divergence.mean() >= best.mean() - 1e-12
    # The estimate of the bound agrees with the closed form, row by row; its error is resolved, and twins are told apart.
    torch.manual_seed(1)
    weights = avi.log_weights(linear.model, guide_of_rows, linear.x, num_samples=300, seed=1)
    expected, se = linear.evidence - divergence, weights.local.std(0) / 300**0.5
    assert 5 * se.max() < 0.5 * linear.evidence.abs().mean()
    assert ((weights.local.mean(0) - expected).abs() < 5 * se).all()
    total = avi.elbo(weights)
    assert abs(total.value - expected.sum().item()) < 5 * total.se < divergence.sum()
    assert abs(total.value - linear.evidence.sum().item()) > 5 * total.se


# --- digits


@torch.no_grad()
def reconstruction(model, guide, x):
    conditioned = poutine.condition(model, data=guide.median(x))
    return poutine.trace(conditioned).get_trace(x).nodes["x"]["fn"].mean


def test_the_reconstruction_of_a_constant_guide_is_the_mean_image():
    data = datasets.load("digits", num_train=300)
    model = avi.models.BayesianDecoder(avi.models.DenseDecoder(4, (8,), (1, 8, 8)), size=len(data.train))
    guide = avi.ConstantGuide(model, init_scale=math.exp(-2))
    train(model, guide, data.train, lr=0.03, steps=300)
    for x in (data.train, data.test):
        error = (reconstruction(model, guide, x) - x).square().mean().item()
        of_mean_image = (data.train.mean(0) - x).square().mean().item()
        assert error == pytest.approx(of_mean_image, rel=0.01)
    # Not because all images are alike, nor because that is what the guide starts at.
    untrained = avi.ConstantGuide(model).setup(data.train)
    start = (reconstruction(model, untrained, data.train) - data.train).square().mean()
    assert start > 1.5 * of_mean_image


@pytest.mark.slow
def test_constant_amortized_and_factorized_guides_are_nested_in_their_bounds():
    x = datasets.load("digits", num_train=100).train
    torch.manual_seed(0)
    likelihood = avi.models.GaussianLikelihood(x.std().item(), learned=True)
    start = avi.models.VAE(avi.models.DenseDecoder(4, (24,), (1, 8, 8)), size=len(x), likelihood=likelihood)

    def bound(model, guide):
        torch.manual_seed(1)
        return avi.elbo(avi.log_weights(model, guide, x, num_samples=100, seed=1))

    constant_model, model = copy.deepcopy(start), copy.deepcopy(start)
    constant = avi.ConstantGuide(constant_model)
    train(constant_model, constant, x, lr=0.01, steps=800)
    amortized = avi.AmortizedGuide(model, encoder=(8,))
    train(model, amortized, x, lr=0.01, steps=1500)
    bounds = [bound(constant_model, constant), bound(model, amortized)]
    # Warm-started: every row from its encoder's output, the decoder from the trained one; then all move together.
    factorized = avi.refine(model, amortized, x, num_steps=200)
    bounds.append(bound(model, factorized))
    train(model, factorized, x, lr=0.005, steps=800)
    bounds.append(bound(model, factorized))
    for lower, upper in zip(bounds, bounds[1:], strict=False):
        assert upper.value - lower.value > 5 * math.hypot(lower.se, upper.se)
    # The latents are alive: the rows' factors tell them apart, and the noise has fallen.
    assert model.likelihood.scale < 0.8 * start.likelihood.scale
    assert reconstruction(model, factorized, x).std(0).mean() > 0.5 * x.std(0).mean()
