"""Distillation: an encoder that can hold a table takes all of it, and what it cannot is reported."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi

# z_n ~ N(0, 1), x_n ~ N(TAU z_n, SIGMA^2): the best means are linear in x_n, and all scales are the same.
TAU, SIGMA, N = 0.8, 0.6, 12
X = torch.linspace(-2.0, 2.5, N)
SD = SIGMA / math.hypot(TAU, SIGMA)
MEANS = TAU * X / (TAU**2 + SIGMA**2)


def model(x, index=None):
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(TAU * z, SIGMA), obs=x)


class Identity(torch.nn.Module):
    """The row itself as its feature."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x[:, None]


def table(means=MEANS):
    guide = avi.FactorizedGuide(model).setup(X)
    with torch.no_grad():
        guide.table.copy_(torch.stack([means, torch.full_like(X, math.log(SD))], 1))
    return guide


def test_an_encoder_that_can_takes_all_of_the_table():
    guide = table()
    before = copy.deepcopy(guide.state_dict())
    distilled = avi.distill(guide, Identity(), X, num_steps=600, lr=lambda step: 0.1 * (1 - step / 600), progress=False)
    fitted = distilled.guide.variational_parameters(X)
    torch.testing.assert_close(fitted, guide.table, rtol=0.0, atol=0.01)
    # The bounds of q* minus those of another normal are KL divergences, since q* is the posterior.
    assert distilled.after.per_row.value < 1e-3
    assert distilled.losses[-1] < 1e-3 * distilled.losses[0]
    assert all(torch.equal(guide.state_dict()[name], value) for name, value in before.items())


def test_the_gap_before_is_the_divergence_of_the_untrained_encoder():
    guide = table()
    untrained = avi.AmortizedGuide(model, Identity()).setup(X)
    q, p = untrained.posterior(X), guide.posterior(X)
    exact = torch.distributions.kl_divergence(q, p)
    distilled = avi.distill(guide, untrained, X, num_steps=1, lr=0.0, num_samples=2000, progress=False)
    estimate = distilled.before
    assert estimate.per_row.se < 0.02 * exact.mean()
    assert ((estimate.rows - exact).abs() < 5 * estimate.rows_se + 1e-4).all()
    torch.testing.assert_close(distilled.after.rows, estimate.rows)


def test_what_an_encoder_cannot_hold_is_left():
    # No function of x that is linear has a wave: KL >= the mean square of the rest over 2 SD^2.
    wave = 0.5 * torch.tensor([1.0, -1.0]).repeat(N // 2)
    wave = wave - X * (wave @ X) / (X @ X)
    guide = table(MEANS + wave)
    distilled = avi.distill(guide, Identity(), X, num_steps=300, lr=0.05, progress=False)
    centred = torch.stack([torch.ones_like(X), X], 1)
    rest = wave - centred @ torch.linalg.lstsq(centred, wave[:, None]).solution[:, 0]
    least = (rest.square() / (2 * SD**2)).sum()
    # By the table's own draws the divergence is known exactly; one scale for all rows makes room for the rest.
    assert 0.3 * least < distilled.losses[-1] < 1.01 * least


def test_minibatches_reach_the_same():
    guide = table()
    batches = avi.minibatches(X, batch_size=4)
    distilled = avi.distill(guide, Identity(), X, num_steps=400, lr=0.05, batches=batches, progress=False)
    assert distilled.after.per_row.value < 5e-3


def test_an_encoder_can_be_trained_on():
    guide = table()
    first = avi.distill(guide, Identity(), X, num_steps=200, lr=0.05, progress=False)
    kept = copy.deepcopy(first.guide.state_dict())
    again = avi.distill(guide, first.guide, X, num_steps=1, lr=0.0, progress=False)
    assert again.before.per_row.value == pytest.approx(first.after.per_row.value, abs=1e-6)
    assert all(torch.equal(first.guide.state_dict()[name], value) for name, value in kept.items())
    assert again.guide is not first.guide


@pytest.mark.parametrize("family", [avi.DiagonalNormal, avi.MultivariateNormal, avi.RowFlow])
def test_globals_supports_and_families(family):
    def shared(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(rate + z, scale), obs=x)

    guide = avi.FactorizedGuide(shared, family=family()).setup(X)
    avi.fit(shared, guide, X, num_steps=20, lr=0.05, progress=False)
    distilled = avi.distill(guide, (8,), X, num_steps=60, lr=0.02, progress=False)
    assert distilled.losses.isfinite().all()
    assert distilled.losses[-10:].mean() < distilled.losses[:10].mean()
    mine, theirs = distilled.guide.global_guide.state_dict(), guide.global_guide.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_discrete_latents():
    def mixture(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(3.0 * y, 1.0), obs=x)

    guide = avi.FactorizedGuide(mixture).setup(X)
    with torch.no_grad():
        guide.table.copy_(torch.stack([torch.zeros_like(X), 2 * X], 1))
    distilled = avi.distill(guide, Identity(), X, num_steps=400, lr=0.05, progress=False)
    assert distilled.losses[-1] < 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: avi.distill(avi.ConstantGuide(model).setup(X), (4,), X, num_steps=1),
            "FactorizedGuide, got ConstantGuide",
        ),
        (lambda: avi.distill(table(), (4,), X[:5], num_steps=1), "Expected all 12 rows"),
        (lambda: avi.distill(table(), (0,), X, num_steps=1), "width"),
        (lambda: avi.distill(table(), (4,), X, num_steps=0), "num_steps"),
        (
            lambda: avi.distill(
                table(), avi.AmortizedGuide(model, family=avi.MultivariateNormal()).setup(X), X, num_steps=1
            ),
            "family of the table, DiagonalNormal",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
