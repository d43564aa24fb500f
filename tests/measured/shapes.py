"""Rows whose posterior is no normal: two modes, a skew, an end."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from scipy import stats

from tests.measured.exact import array, integral, log_normal, mixed
from tests.measured.rows import NOISE, X, row_evidence
from tests.measured.structure import add

__all__: list[str] = []

COUNTS = torch.tensor([0, 1, 5, 2, 0, 9])
EXPOSURE = torch.tensor([1.0, 3.0, 2.0, 0.5, 4.0, 2.0])


def by_row(log_densities, **bounds):
    """``[N]`` the integrals of functions of one variable."""
    return [integral(log_density, **bounds) for log_density in log_densities]


def two_modes(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z.square(), NOISE), obs=x)


SQUARES = torch.tensor([1.5, 0.3, 2.5])

add(
    "two modes",
    two_modes,
    (SQUARES,),
    by_row([lambda z, x=x: log_normal(z, 0, 1) + log_normal(x, z**2, NOISE) for x in array(SQUARES)]),
    brute_force="wide",
)


def counts(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.5))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x)


add(
    "a skewed posterior",
    counts,
    (COUNTS,),
    by_row([lambda z, x=x: log_normal(z, 0, 1.5) + stats.poisson.logpmf(x, np.exp(z)) for x in COUNTS.numpy()]),
)


def rates(x, exposure):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("x", dist.Poisson(rate * exposure), obs=x)


add(
    "Gamma and Poisson, exposures",
    rates,
    (COUNTS, EXPOSURE),
    stats.nbinom.logpmf(COUNTS.numpy(), 2, 1 / (1 + array(EXPOSURE))),
    amortized={"inputs": lambda x, exposure: torch.stack([x.float().log1p(), exposure.log()], -1)},
)


def shares(x):
    with pyro.plate("data", len(x)):
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 3.0))
        pyro.sample("x", dist.Binomial(10, share), obs=x)


TRIALS = COUNTS.float()

add("Beta and binomial", shares, (TRIALS,), stats.betabinom.logpmf(COUNTS.numpy(), 10, 2, 3))


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 0.5))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "log-normal latent",
    positive,
    (X,),
    # Over the logarithm.
    by_row([lambda u, x=x: log_normal(u, 0, 0.5) + log_normal(x, np.exp(u), NOISE) for x in array(X)]),
)


def simplex(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([2.0, 3.0])))
        pyro.sample("x", dist.Normal(4 * z[..., 0], NOISE), obs=x)


add(
    "simplex",
    simplex,
    (X,),
    # The first share is a Beta.
    by_row(
        [lambda z, x=x: stats.beta.logpdf(z, 2, 3) + log_normal(x, 4 * z, NOISE) for x in array(X)],
        low=1e-9,
        high=1 - 1e-9,
        points=20001,
    ),
)


def bounded(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(torch.tensor(-2.0), 3.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "interval",
    bounded,
    (X,),
    np.log(stats.norm.cdf(3, array(X), NOISE) - stats.norm.cdf(-2, array(X), NOISE)) - math.log(5),
)

LOCS = (-1.5, 1.0)


def mixture_prior(x):
    with pyro.plate("data", len(x)):
        components = dist.Normal(torch.tensor(LOCS), 0.7)
        z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def mixture_apart(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))
        parts = [dist.Normal(loc, 0.7).log_prob(z) + math.log(p) for loc, p in zip(LOCS, (0.3, 0.7), strict=True)]
        pyro.factor("prior", torch.logaddexp(*parts) - dist.Normal(0.0, 2.0).log_prob(z))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "a mixture as prior",
    mixture_prior,
    (X[:3],),
    mixed([log_normal(array(X[:3]), loc, math.hypot(0.7, NOISE)) for loc in LOCS], [0.3, 0.7]),
    brute_force="wide",
    restated=mixture_apart,
)


def ordered(x):
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        z = pyro.sample("z", dist.TransformedDistribution(base, [transforms.OrderedTransform()]))
        pyro.sample("x", dist.Normal(z[..., 0], NOISE), obs=x)


# The first coordinate is the normal itself, the second is not seen.
add("ordered vector", ordered, (X,), row_evidence(X))
