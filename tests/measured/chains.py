"""Hidden Markov chains in the rows, enumerated, beside a continuous latent."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from scipy.special import logsumexp

from tests.measured.discrete import LOCS, SUM_OUT, component
from tests.measured.exact import array, integral, log_bernoulli, log_normal
from tests.measured.rows import NOISE
from tests.measured.structure import SEVERAL_PLATES, add

__all__: list[str] = []


STAY = np.array([[0.8, 0.2], [0.3, 0.7]])
SERIES = torch.tensor([[-1.0, -1.4, 0.8], [1.3, 0.9, 1.1], [-0.2, 2.0, 1.7]])


def hidden_chain(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        state = 0
        for t in pyro.markov(range(x.shape[-1])):
            probs = Vindex(torch.tensor(STAY, dtype=torch.float32))[state]
            state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer=SUM_OUT)
            pyro.sample(f"x_{t}", dist.Normal(z + component(state), NOISE), obs=x[..., t])


def of_chain(x, loc):
    """Given what shifts all of a series, over all paths of the chain, which starts from its state 0."""
    paths = []
    for path in itertools.product(range(2), repeat=len(x)):
        steps = sum(math.log(STAY[one, two]) for one, two in itertools.pairwise((0, *path)))
        paths.append(steps + sum(log_normal(value, loc + LOCS[s], NOISE) for value, s in zip(x, path, strict=True)))
    return logsumexp(paths, axis=0)


def as_arguments(values):
    return (torch.stack([values[f"x_{t}"] for t in range(3)], -1),), {}


CHAINS = dict(amortized={"inputs": lambda x: x.flatten(1)}, rebuild=as_arguments)

add(
    "a hidden Markov chain a row, enumerated",
    hidden_chain,
    (SERIES,),
    [integral(lambda z, x=x: log_normal(z, 0, 1) + of_chain(x, z)) for x in array(SERIES)],
    **CHAINS,
)

CAUGHT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
SURVIVAL = 0.8


def recaptures(x):
    """Alive from the first capture on, with a chance of being caught again that is the animal's own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        alive = torch.ones(len(x))
        seen = torch.zeros(len(x), dtype=torch.bool)
        for t in pyro.markov(range(x.shape[-1])):
            # Before the first capture it is known to live, and the model says nothing of captures.
            survival = torch.where(seen, SURVIVAL * alive, 1.0)
            alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival), infer=SUM_OUT)
            with poutine.mask(mask=seen):
                pyro.sample(f"x_{t}", dist.Bernoulli(z.sigmoid() * alive), obs=x[..., t])
            seen = seen | (x[..., t] > 0)


def of_animal(x, z):
    first = int(np.argmax(x))
    later = x[first + 1 :]
    cases = []
    # How many steps it lived on.
    for steps in range(len(later) + 1):
        if later[steps:].any():
            continue
        lived = steps * math.log(SURVIVAL) + (math.log(1 - SURVIVAL) if steps < len(later) else 0.0)
        cases.append(lived + sum((log_bernoulli(caught, z) for caught in later[:steps]), np.zeros_like(z)))
    return logsumexp(np.stack(cases), axis=0)


add(
    "capture and recapture",
    recaptures,
    (CAUGHT,),
    [integral(lambda z, x=x: log_normal(z, 0, 1) + of_animal(x, z)) for x in array(CAUGHT)],
    **CHAINS,
)


def mixed_chains(x):
    """Effects of groups and of members, and a chain for each member."""
    with pyro.plate("groups", x.shape[0], dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("members", x.shape[1], dim=-1):
            w = pyro.sample("w", dist.Normal(torch.zeros(1), 0.5))
            state = 0
            for t in pyro.markov(range(x.shape[-1])):
                probs = Vindex(torch.tensor(STAY, dtype=torch.float32))[state]
                state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer=SUM_OUT)
                pyro.sample(f"x_{t}", dist.Normal(z + w + component(state), NOISE), obs=x[..., t])


OF_MEMBERS = torch.stack([SERIES[:2], SERIES[1:] - 0.5])


def of_group(members):
    def of_member(x, z):
        grid = np.linspace(-4.0, 4.0, 81)
        inner = log_normal(grid, 0, 0.5) + of_chain(x, z[:, None] + grid)
        return logsumexp(inner, axis=-1) + math.log(grid[1] - grid[0])

    return integral(lambda z: log_normal(z, 0, 1) + sum(of_member(x, z) for x in members), points=241)


MIXED = dict(
    nesting=2,
    brute_force="wide",
    rebuild=as_arguments,
)

add(
    "mixed hidden Markov chains, one row set",
    mixed_chains,
    (OF_MEMBERS,),
    [of_group(members) for members in array(OF_MEMBERS)],
    options={"plate": "groups"},
    amortized={"inputs": lambda x: x.flatten(1)},
    num_samples=800,
    **MIXED,
)
add(
    "mixed hidden Markov chains, two row sets",
    mixed_chains,
    (OF_MEMBERS,),
    [of_group(members) for members in array(OF_MEMBERS)],
    options={"plate": ("groups", "members")},
    refused=SEVERAL_PLATES,
    num_samples=800,
    **MIXED,
)
