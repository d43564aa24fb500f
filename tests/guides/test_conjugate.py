"""Trained guides against exact posteriors: linear models with normal noise, where every row's posterior is a normal."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_avi as avi

ROWS = 24


class Linear:
    r"""z_n ~ N(0, I), x_n ~ N(W z_n, sigma^2 I): the posterior is N(means_n, inverse of precision)."""

    def __init__(self, weight, sigma):
        self.weight, self.sigma = torch.tensor(weight), sigma
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(ROWS, self.weight.shape[1], generator=generator)
        noise = torch.randn(ROWS, len(self.weight), generator=generator)
        self.x = self.z @ self.weight.T + sigma * noise
        self.precision = torch.eye(self.weight.shape[1]) + self.weight.T @ self.weight / sigma**2
        self.means = torch.linalg.solve(self.precision, self.weight.T @ self.x.T / sigma**2).T
        covariance = self.weight @ self.weight.T + sigma**2 * torch.eye(len(self.weight))
        self.evidence = dist.MultivariateNormal(torch.zeros(len(self.weight)), covariance).log_prob(self.x)

    def __call__(self, x, index=None):
        with pyro.plate("data", ROWS, subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.z.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, self.sigma).to_event(1), obs=x)


def scalar():
    return Linear([[1.0]], sigma=0.5)


def correlated():
    return Linear([[1.0, 0.7], [0.6, 1.0], [0.5, 0.5]], sigma=0.6)


GUIDES = {
    # The posterior's mean is linear in the row: a head without an encoder can give it.
    "linear": lambda model, **kwargs: avi.AmortizedGuide(model, nn.Identity(), **kwargs),
    "encoder": lambda model, **kwargs: avi.AmortizedGuide(model, (16,), **kwargs),
    "table": avi.FactorizedGuide,
}
FULL = {
    "MultivariateNormal": lambda: avi.MultivariateNormal(),
    "LowRankNormal": lambda: avi.LowRankNormal(rank=1),
    "Flow": lambda: avi.Flow(transforms=1, hidden=(8,), context=2, bins=4),
}


def train(model, guide, *, steps, elbo=TraceMeanField_ELBO):
    """Adam along a cosine, each step with many draws: what is left of their noise is small."""
    avi.fit(
        model,
        guide,
        model.x,
        num_steps=steps,
        lr=lambda step: 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps)),
        elbo=elbo(num_particles=64, vectorize_particles=True, max_plate_nesting=1),
        progress=False,
    )


def assert_moments(posterior, mean, sd):
    """Means within 5 % of the posterior's standard deviation, standard deviations within 5 %, in every row."""
    assert ((posterior.mean - mean) / sd).abs().max() < 0.05
    assert (posterior.stddev / sd - 1).abs().max() < 0.05


@pytest.mark.parametrize(
    "kind, make_model",
    [("linear", scalar), ("encoder", scalar), ("table", scalar), ("linear", correlated), ("table", correlated)],
)
def test_mean_field_guides_reach_the_exact_factor(kind, make_model):
    model = make_model()
    guide = GUIDES[kind](model).setup(model.x)

    train(model, guide, steps=300)

    # The best diagonal normal has the posterior's mean and its conditional variances; of one latent it is the posterior.
    assert_moments(guide.posterior(model.x), model.means, model.precision.diagonal() ** -0.5)


def bound(model, guide, num_samples=100):
    """The ELBO, nats a row on average, and its standard error."""
    torch.manual_seed(1)
    weights = avi.log_weights(model, guide, model.x, num_samples=num_samples, seed=1).local.mean(-1)
    return weights.mean(), weights.std() / num_samples**0.5


@pytest.mark.parametrize(
    "kind, family",
    [("linear", "MultivariateNormal"), *((kind, family) for kind in ("encoder", "table") for family in FULL)],
)
def test_full_covariances_reach_the_exact_evidence(kind, family):
    model = correlated()
    guide = GUIDES[kind](model, family=FULL[family]()).setup(model.x)

    train(model, guide, steps=300, elbo=Trace_ELBO)

    elbo, error = bound(model, guide)
    assert error < 0.002
    assert (elbo - model.evidence.mean()).abs() < 0.01
    if family == "MultivariateNormal":
        # What a row loses is its divergence from the posterior.
        exact = dist.MultivariateNormal(model.means, precision_matrix=model.precision)
        posterior = guide.posterior(model.x)
        assert kl_divergence(posterior, exact).max() < 0.01
        if kind != "encoder":
            assert_moments(posterior, exact.mean, exact.stddev)


def test_a_diagonal_family_loses_what_it_must():
    # Otherwise the evidence above would tell nothing.
    model = correlated()
    guide = avi.FactorizedGuide(model).setup(model.x)
    with torch.no_grad():
        guide.table.copy_(torch.cat([model.means, -0.5 * model.precision.diagonal().log().expand(ROWS, 2)], -1))

    elbo, error = bound(model, guide)

    gap = 0.5 * (model.precision.diagonal().log().sum() - model.precision.logdet())
    assert gap > 0.1
    assert (model.evidence.mean() - elbo - gap).abs() < 5 * error < 0.3


def correlation_after_loader(guide, model, batches):
    avi.fit(
        model,
        guide,
        batches=batches,
        num_steps=400,
        lr=lambda step: 0.1 * 0.5 * (1 + math.cos(math.pi * step / 400)),
        elbo=TraceMeanField_ELBO(),
        progress=False,
    )
    means = guide.posterior(model.x).mean.detach()[:, 0]
    return torch.corrcoef(torch.stack([means, model.z[:, 0]]))[0, 1]


@pytest.mark.parametrize("kind", ["encoder", "table"])
def test_rows_stay_together_in_training_by_loader(kind):
    model = Linear([[1.0]], sigma=0.1)
    guide = GUIDES[kind](model)

    assert correlation_after_loader(guide, model, avi.minibatches(model.x, batch_size=10)) > 0.99


def test_rows_that_are_torn_apart_are_seen():
    model = Linear([[1.0]], sigma=0.1)
    batches = ((x, (index + 1) % ROWS) for x, index in avi.minibatches(model.x, batch_size=10))

    assert correlation_after_loader(avi.FactorizedGuide(model), model, batches) < 0.5
