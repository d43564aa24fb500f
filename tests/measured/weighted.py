"""Masks and scales, around sites and within distributions."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from tests.measured.exact import array, integral, log_normal
from tests.measured.rows import NOISE, ROWS, TABLE, X, row_evidence
from tests.measured.structure import add

__all__: list[str] = []

PRESENT = torch.arange(3 * ROWS).reshape(ROWS, 3) % 4 > 0
VALID = torch.arange(ROWS) % 3 > 0

# A latent without a density of its own has no evidence that these could be right about.
NO_PRIOR = {
    "ais": "(?s)latents with a density.*mask",
    "sbc": "(?s)draws follow its density.*mask",
}


def elementwise():
    """``[N]`` of elements that are independent, those that are there alone."""
    return (row_evidence(TABLE) * array(PRESENT)).sum(-1)


def masked_elements(x, present):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).mask(present).to_event(1), obs=x)


add(
    "an observation masked within its event",
    masked_elements,
    (TABLE, PRESENT),
    elementwise(),
    is_conjugate=True,
    num_samples=800,
)


def masked_latents(x, present):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).mask(present).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).mask(present).to_event(1), obs=x)


add(
    "a latent masked within its event",
    masked_latents,
    (TABLE, PRESENT),
    elementwise(),
    refused=NO_PRIOR,
    is_conjugate=True,
    brute_force=None,
    num_samples=800,
)


def masked_rows(x, valid):
    with pyro.plate("data", len(x)), poutine.mask(mask=valid):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "masked rows",
    masked_rows,
    (X, VALID),
    row_evidence(X) * array(VALID),
    refused=NO_PRIOR,
    is_conjugate=True,
    brute_force=None,
)


def masked_times(x, present):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("times", 3, dim=-1), poutine.mask(mask=present):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def of_mean(x):
    """Of a standard normal that is seen several times."""
    return integral(lambda z: log_normal(z, 0, 1) + sum(log_normal(value, z, NOISE) for value in x))


add(
    "masked observations in an inner plate",
    masked_times,
    (TABLE, PRESENT),
    [of_mean(x[there]) for x, there in zip(array(TABLE), PRESENT.numpy(), strict=True)],
    is_conjugate=True,
    nesting=2,
)


def missing(x, seen):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x, obs_mask=seen)


add(
    "missing observations, obs_mask",
    missing,
    (X, VALID),
    row_evidence(X) * array(VALID),
    refused=NO_PRIOR,
    brute_force=None,
    num_samples=800,
)


def scaled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "a scaled observation",
    scaled,
    (X,),
    [integral(lambda z, x=x: log_normal(z, 0, 1) + 0.5 * log_normal(x, z, NOISE)) for x in array(X)],
    refused={"sbc": "(?s)draws follow its density.*scale.*'x'"},
    is_conjugate=True,
)


def followed_around(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with poutine.mask(mask=z > 0):
            w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + w, NOISE), obs=x)


def followed_within(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).mask(z[..., None] > 0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(-1), NOISE), obs=x)


FOLLOWED = dict(evidence=np.zeros(ROWS), brute_force=None, refused={"setup": "(?s)mask"})

add("a mask around a latent that follows another", followed_around, (X,), **FOLLOWED)
add("a mask within a latent that follows another", followed_within, (X,), **FOLLOWED)
