"""The problem of the sweep `series`: a model of a series, its closed forms, and encoders of a row and of a window."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_avi as avi
from pyro_avi.encoders import MLP, Polynomial

__all__ = ["Series"]

A, THETA, DATA_SEED = 0.75, 3.4159, 2012
#: The standard deviation of the prior of theta, in place of the flat one, which has no draws.
WIDE = 100.0

Guide = avi.AmortizedGuide | avi.ConstantGuide | avi.FactorizedGuide


def model(x: Tensor) -> None:
    """z_n ~ N(x_{n-1}, 1), x_n ~ N(a (z_n + theta), 1), x_0 = 0."""
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(()), WIDE))
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(_before(x), 1.0))
        pyro.sample("x", dist.Normal(A * (z + theta), 1.0), obs=x)


def _before(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x[:-1]])


def _simulate(rows: int) -> Tensor:
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(DATA_SEED)).double()
    values, last = [], torch.zeros((), dtype=torch.float64)
    for each in noise:
        last = A * (THETA + last) + each
        values.append(last)
    return torch.stack(values).float()


class Series:
    """The model on simulated data: a `comparison.training.Problem`.

    The best independent normals have, with y_n = x_n - a x_{n-1} ~ N(a theta, 1 + a^2),

        q(theta) = N(t, 1 / (N a^2 + 1 / w^2)),  t the posterior's mean,
        q(z_n) = N((x_{n-1} + a (x_n - a t)) / (1 + a^2), 1 / (1 + a^2)),

    and an inference function whose mean is off by d_n loses (1 + a^2) / 2 sum_n d_n^2 of their bound.
    """

    def __init__(self, rows: int):
        self.model, self.x = model, _simulate(rows)
        x, before = self.x.double(), _before(self.x.double())
        of_data, of_prior = rows * A**2, WIDE**-2
        posterior = of_data / (1 + A**2) + of_prior
        theta = A * (x - A * before).sum() / (1 + A**2) / posterior
        mean = (before + A * (x - A * theta)) / (1 + A**2)
        precision = torch.full_like(mean, 1 + A**2)
        self.best = self._elbo(theta, (of_data + of_prior) ** -0.5, mean, precision.rsqrt())
        self.evidence = self.best + 0.5 * math.log((of_data + of_prior) / posterior)
        # Of the products of theta's and each z's distance from its mean, of which a^2 is the weight.
        self.spread = (A**2 / (1 + A**2)) ** 0.5
        self._mean = mean

    def _elbo(self, theta: Tensor, theta_scale: Tensor | float, loc: Tensor, scale: Tensor) -> float:
        """The ELBO of independent normals, term by term."""
        x, before = self.x.double(), _before(self.x.double())
        theta_scale = torch.as_tensor(theta_scale, dtype=torch.float64)
        log_two_pi = math.log(2 * math.pi)
        of_data = (x - A * (loc + theta)).square() + A**2 * (scale.square() + theta_scale.square())
        of_prior = (loc - before).square() + scale.square()
        rows = -log_two_pi - 0.5 * (of_data + of_prior) + scale.log() + 0.5 * (1 + log_two_pi)
        of_theta = -0.5 * (theta.square() + theta_scale.square()) / WIDE**2 - math.log(WIDE) + theta_scale.log() + 0.5
        return (rows.sum() + of_theta).item()

    def guide(self, arm: str) -> Guide:
        """The guide of an arm."""
        if arm == "F-VI":
            return avi.FactorizedGuide(model)
        if arm == "constant":
            return avi.ConstantGuide(model)
        inputs, _, width = arm.rpartition(", ")
        window = avi.Window(1, 0) if inputs.startswith("window") else None
        features = 1 if window is None else 4
        if width == "linear":
            encoder: nn.Module = Polynomial(features, 1)
        else:
            # Published are ReLUs, of which all can die at once in a narrow layer.
            encoder = MLP(features, (int(width),) * 2, activation=partial(nn.LeakyReLU, 0.2))
        return avi.AmortizedGuide(model, encoder, inputs=window, standardize=True)

    def bound(self, guide: Guide) -> float:
        """The exact ELBO."""
        theta, z = guide.global_guide.posterior_by_site()["theta"], guide.fixed_posterior(self.x)
        loc, scale = (each.double().flatten() for each in (z.mean, z.stddev))
        return self._elbo(theta.mean.double(), theta.stddev.double(), loc, scale)

    def predicted(self, arm: str) -> float | None:
        """What the best factors of an arm lose; no formula for networks of x_n alone, which may follow the rows' noise."""
        if arm == "F-VI" or arm.startswith("window"):
            return 0.0
        if arm not in ("constant", "x_n, linear"):
            return None
        ones = torch.ones(len(self.x), dtype=torch.float64)
        design = torch.stack([ones] if arm == "constant" else [ones, self.x.double()], -1)
        fitted = design @ torch.linalg.lstsq(design, self._mean).solution
        return (0.5 * (1 + A**2) * (self._mean - fitted).square().sum()).item()
