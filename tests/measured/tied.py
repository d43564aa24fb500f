"""Observations in other plates than the latents, and rows that a factor ties together."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from scipy.stats import multivariate_normal

import pyro_avi as avi
from tests.measured.exact import array, integral, integral_2d, linear_normal, log_bernoulli, log_normal
from tests.measured.rows import NOISE, X
from tests.measured.structure import TIED, add, add_made

__all__: list[str] = []

GROUPS = 5
# Several of a group, one, none.
GROUP = torch.tensor([0, 0, 2, 1, 2, 2, 0, 4])
SEEN = torch.tensor([-1.5, 0.3, 2.0, 0.9, 1.4, 2.6, -0.7, 0.2])
KEPT = torch.tensor([True, False, True, True, True, False, True, False])


def of_groups(evidence):
    """``[G]`` a function of the observations' positions, for every group."""
    return [evidence(np.flatnonzero(GROUP.numpy() == group)) for group in range(GROUPS)]


def group_means(x, group, *more):
    """``[G, 2]`` what an encoder reads of a group: the sum of its observations, and their number."""
    ones = torch.zeros(GROUPS).index_add(0, group, torch.ones_like(x))
    return torch.stack([torch.zeros(GROUPS).index_add(0, group, x), ones], -1)


def normal_group(rows, x=SEEN):
    return linear_normal(array(x)[rows], np.ones((len(rows), 1)), NOISE) if len(rows) else 0.0


OF_GROUPS = dict(options={"plate": "groups"}, amortized={"inputs": group_means})


def groups(x, group):
    with pyro.plate("groups", GROUPS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("obs", len(x)):
        pyro.sample("x", dist.Normal(z[..., group], NOISE), obs=x)


add("observations in another plate", groups, (SEEN, GROUP), of_groups(normal_group), is_conjugate=True, **OF_GROUPS)


def varying_intercepts(x, group, floor):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", GROUPS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("obs", len(x)):
        pyro.sample("x", dist.Normal(z[..., group] + slope * floor, NOISE), obs=x)


FLOOR = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0])

add(
    "observations in another plate, global latents",
    varying_intercepts,
    (SEEN, GROUP, FLOOR),
    of_groups(lambda rows: normal_group(rows, SEEN - 0.4 * FLOOR)),
    theta={"slope": torch.tensor(0.4)},
    total=linear_normal(array(SEEN), np.c_[array(FLOOR), np.eye(GROUPS)[GROUP]], NOISE),
    is_conjugate=True,
    **OF_GROUPS,
)


def masked_groups(x, group, kept):
    with pyro.plate("groups", GROUPS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("obs", len(x)), poutine.mask(mask=kept):
        pyro.sample("x", dist.Normal(z[..., group], NOISE), obs=x)


add(
    "masked observations in another plate",
    masked_groups,
    (SEEN, GROUP, KEPT),
    of_groups(lambda rows: normal_group(rows[KEPT.numpy()[rows]])),
    is_conjugate=True,
    **OF_GROUPS,
)


def scaled_groups(x, group):
    with pyro.plate("groups", GROUPS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("obs", len(x)), poutine.scale(scale=2.0):
        pyro.sample("x", dist.Normal(z[..., group], NOISE), obs=x)


add(
    "scaled observations in another plate",
    scaled_groups,
    (SEEN, GROUP),
    of_groups(
        lambda rows: integral(
            lambda z: log_normal(z, 0, 1) + 2 * sum(log_normal(x, z, NOISE) for x in array(SEEN)[rows])
        )
    ),
    refused={"sbc": "(?s)draws follow its density.*scale.*'x'"},
    is_conjugate=True,
    **OF_GROUPS,
)


# --- ties

PLAYERS = 5
FIRST, SECOND = torch.tensor([0, 2, 0]), torch.tensor([3, 1, 3])
LEAD = torch.tensor([1.2, -0.4, 0.7])
# Two pairs, and one who has not played.
PAIRS = (0, 1, 1, 0, 2)


def games(lead, first, second):
    with pyro.plate("players", PLAYERS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("games", len(lead)):
        pyro.sample("lead", dist.Normal(z[..., first] - z[..., second], NOISE), obs=lead)


def leads(lead, first, second):
    """``[N, 2]`` sums of leads and numbers of games."""
    zeros = torch.zeros(PLAYERS)
    total = zeros.index_add(0, first, lead).index_add(0, second, -lead)
    count = zeros.index_add(0, first, torch.ones_like(lead)).index_add(0, second, torch.ones_like(lead))
    return torch.stack([total, count], -1)


OF_PLAYERS = dict(options={"plate": "players"}, amortized={"inputs": leads}, blocks=PAIRS, refused=TIED)
DIFFERENCE = np.array([[1.0, -1.0]])

add(
    "pairs of rows, normal",
    games,
    (LEAD, FIRST, SECOND),
    [linear_normal(array(LEAD)[[0, 2]], DIFFERENCE.repeat(2, 0), NOISE), linear_normal([-0.4], DIFFERENCE, NOISE), 0.0],
    num_samples=800,
    **OF_PLAYERS,
)


def contests(won, first, second):
    with pyro.plate("players", PLAYERS):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("games", len(won)):
        pyro.sample("won", dist.Bernoulli(logits=2 * (z[..., first] - z[..., second])), obs=won)


WON = torch.tensor([1.0, 0.0, 1.0])


def contest_evidence(won):
    return integral_2d(
        lambda a, b: log_normal(a, 0, 1) + log_normal(b, 0, 1) + sum(log_bernoulli(x, 2 * (a - b)) for x in won)
    )


add(
    "pairs of rows, Bradley and Terry",
    contests,
    (WON, FIRST, SECOND),
    [contest_evidence([1, 1]), contest_evidence([0]), 0.0],
    num_samples=800,
    **OF_PLAYERS,
)

TIMES = 4
CHAIN = 0.8


def chain_covariance(transition, variance):
    """``[T, T]`` of a stationary chain."""
    lag = np.abs(np.subtract.outer(np.arange(TIMES), np.arange(TIMES)))
    return variance / (1 - transition**2) * transition**lag


def state_space():
    one = torch.ones(1, 1)
    return avi.models.LinearGaussianStateSpace(CHAIN * one, one, size=TIMES, transition_scale=0.6, emission_scale=NOISE)


SERIES = X[:TIMES]

add_made(
    "a joint prior of all rows",
    state_space,
    (SERIES[:, None],),
    multivariate_normal.logpdf(
        array(SERIES), np.zeros(TIMES), chain_covariance(CHAIN, 0.36) + NOISE**2 * np.eye(TIMES)
    ),
    blocks=(0,) * TIMES,
    refused=TIED,
    applies=("log_weights", "ais", "refine", "sbc", "posterior_predictive", "to_arviz"),
    options={"plate": "time"},
    init_scale=0.5,
    num_samples=800,
)


def random_walk(x):
    with pyro.plate("time", TIMES):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)
    with pyro.plate("steps", TIMES - 1):
        pyro.factor("smooth", dist.Normal(z[..., 1:], 0.6).log_prob(z[..., :-1]))


def walk_evidence():
    """Of the data and of the differences, seen as zeros."""
    design = np.r_[np.eye(TIMES) / NOISE, np.diff(np.eye(TIMES), axis=0) / 0.6]
    seen = np.r_[array(SERIES) / NOISE, np.zeros(TIMES - 1)]
    scales = TIMES * math.log(NOISE) + (TIMES - 1) * math.log(0.6)
    return linear_normal(seen, design, 1.0, prior_scale=2.0) - scales


add(
    "a factor between neighbours",
    random_walk,
    (SERIES,),
    walk_evidence(),
    blocks=(0,) * TIMES,
    refused=TIED,
    options={"plate": "time"},
    init_scale=0.5,
    num_samples=800,
)
