"""Rows in several plates: nested, crossed, to the left of others."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from tests.measured.exact import array, linear_normal
from tests.measured.rows import NOISE, TABLE
from tests.measured.structure import SEVERAL_PLATES, add

__all__: list[str] = []

PERSONS, ITEMS = 4, 3
TESTS = TABLE[:PERSONS]
OWN = np.ones((ITEMS, 1))


def to_the_left(x):
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("times", x.shape[-1], dim=-1):
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "rows to the left of a plate of observations",
    to_the_left,
    (TESTS,),
    [linear_normal(x, OWN, NOISE) for x in array(TESTS)],
    is_conjugate=True,
    nesting=2,
)


def nested(x):
    with pyro.plate("outer", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with pyro.plate("inner", x.shape[-1], dim=-1):
            w = pyro.sample("w", dist.Normal(z, 0.7))
            pyro.sample("x", dist.Normal(w, NOISE), obs=x)


OF_NESTED = [linear_normal(x, np.c_[OWN, 0.7 * np.eye(ITEMS)], NOISE) for x in array(TESTS)]
NESTED = dict(nesting=2, init_scale=0.5, num_samples=1500)

add("nested plates, one row set", nested, (TESTS,), OF_NESTED, options={"plate": "outer"}, **NESTED)
add(
    "nested plates, two row sets",
    nested,
    (TESTS,),
    OF_NESTED,
    options={"plate": ("outer", "inner")},
    refused=SEVERAL_PLATES,
    **NESTED,
)


def crossed(x):
    persons, items = pyro.plate("persons", len(x), dim=-2), pyro.plate("items", x.shape[-1], dim=-1)
    with persons:
        ability = pyro.sample("ability", dist.Normal(torch.zeros(1), 1.0))
    with items:
        ease = pyro.sample("ease", dist.Normal(torch.zeros(()), 0.7))
    with persons, items:
        pyro.sample("x", dist.Normal(ability + ease, NOISE), obs=x)


EASE = torch.tensor([0.4, -0.6, 0.1])
# Of the table in one vector, persons outermost.
DESIGN = np.c_[np.kron(np.eye(PERSONS), OWN), np.kron(np.ones((PERSONS, 1)), 0.7 * np.eye(ITEMS))]
OF_TABLE = linear_normal(array(TESTS).ravel(), DESIGN, NOISE)

add(
    "crossed plates, two row sets",
    crossed,
    (TESTS,),
    OF_TABLE,
    blocks=(0,) * PERSONS,
    options={"plate": ("persons", "items")},
    refused=SEVERAL_PLATES,
    nesting=2,
    init_scale=0.4,
    num_samples=1500,
)
add(
    "crossed plates, one of them held",
    crossed,
    (TESTS,),
    [linear_normal(x - array(EASE), OWN, NOISE) for x in array(TESTS)],
    theta={"ease": EASE},
    total=OF_TABLE,
    options={"plate": "persons"},
    nesting=2,
    is_conjugate=True,
)
