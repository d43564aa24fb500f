"""Rows that are independent given the globals, each with its own observations."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from tests.measured.exact import array, linear_normal, log_normal
from tests.measured.structure import add

__all__ = ["NOISE", "ROWS", "TABLE", "X", "row_evidence"]

ROWS = 6
X = torch.tensor([-1.5, 0.3, 2.0, 0.9, -0.4, 2.6])
TABLE = torch.stack([0.8 * X, 0.5 - 0.6 * X, 0.2 * X**2], -1)
NOISE = 0.5


def row_evidence(x, loc=0.0):
    """``[N]`` of a standard normal around ``loc``, seen through the noise."""
    return log_normal(array(x), loc, math.hypot(1.0, NOISE))


# --- normal rows


def linear(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add("conjugate rows", linear, (X,), row_evidence(X), is_conjugate=True)


def with_globals(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "global latents",
    with_globals,
    (X,),
    row_evidence(X, 0.3),
    theta={"loc": torch.tensor(0.3)},
    total=linear_normal(array(X), np.full((ROWS, 1), 2.0), math.hypot(1.0, NOISE)),
    is_conjugate=True,
)


def double(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add("double precision", double, (X.double(),), row_evidence(X), is_conjugate=True)

WEIGHT = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.3]])


def vector(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, NOISE).to_event(1), obs=x)


add("vector event", vector, (TABLE,), [linear_normal(row, array(WEIGHT), NOISE) for row in array(TABLE)])

IMAGES = 0.5 * torch.stack([TABLE[:, :2], TABLE[:, 1:]], 1)


def matrix(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        # Every element is seen with that below it.
        pyro.sample("x", dist.Normal(z + 0.5 * z.flip(-2), NOISE).to_event(2), obs=x)


OF_MATRIX = np.kron([[1.0, 0.5], [0.5, 1.0]], np.eye(2))

add("matrix event", matrix, (IMAGES,), [linear_normal(x.ravel(), OF_MATRIX, NOISE) for x in array(IMAGES)])


def computed(x):
    with pyro.plate("data", len(x)):
        raw = pyro.sample("raw", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.deterministic("z", 1.0 + 2.0 * raw)
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "deterministic sites",
    computed,
    (X,),
    log_normal(array(X), 1.0, math.hypot(2.0, NOISE)),
    is_conjugate=True,
)


def sizeless(x):
    with pyro.plate("data"):
        z = pyro.sample("z", dist.Normal(torch.zeros(ROWS), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add("a plate without a size", sizeless, (X,), row_evidence(X), is_conjugate=True)


def regression(x, covariate):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + slope * covariate, NOISE), obs=x)


COVARIATE = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5])

add(
    "a covariate",
    regression,
    (X, COVARIATE),
    row_evidence(X, 0.8 * array(COVARIATE)),
    theta={"slope": torch.tensor(0.8)},
    total=linear_normal(array(X), array(COVARIATE)[:, None], math.hypot(1.0, NOISE)),
    amortized={"inputs": lambda x, covariate: torch.stack([x, covariate], -1)},
    is_conjugate=True,
)


# --- no rows, no data


def all_global(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, NOISE), obs=x)


add(
    "all latents global",
    all_global,
    (X,),
    linear_normal(array(X), np.full((ROWS, 1), 2.0), NOISE),
    blocks=(0,),
    warning="(?s)every latent is global",
    is_conjugate=True,
)


def prior_alone():
    with pyro.plate("data", ROWS):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))


def prior_and_factor():
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        # A density that no draw of the model follows.
        pyro.factor("tilt", -0.5 * z**2)


NO_DATA = dict(
    options={"plate": "data"},
    amortized={"inputs": lambda: torch.zeros(ROWS, 1)},
    is_conjugate=True,
    warning="(?s)",
    refused={
        "sbc": "(?s)Expected an observation in plate 'data'",
        "posterior_predictive": "(?s)Expected a model with observations to draw",
    },
)

add("a prior alone", prior_alone, (), np.zeros(ROWS), **NO_DATA)
add("a prior with a factor", prior_and_factor, (), np.full(ROWS, -0.5 * math.log(2.0)), **NO_DATA)
