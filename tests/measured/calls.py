"""Rows of a call, and models with a state of their own."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from tests.measured.exact import array, linear_normal
from tests.measured.rows import NOISE, ROWS, TABLE, X, row_evidence
from tests.measured.structure import add, add_made

__all__: list[str] = []

INDEX = torch.tensor([4, 0, 3])
ALL = 12


def with_positions(x, index=None):
    with pyro.plate("data", ALL, subsample=index):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "rows with their positions",
    with_positions,
    (X[INDEX], INDEX),
    row_evidence(X[INDEX]),
    scale=ALL / len(INDEX),
    brute_force=None,
    refused={"measure_gaps": "(?s)Expected all rows of a data set, got 3 of 12"},
    applies=("log_weights", "ais", "measure_gaps", "posterior_predictive", "to_arviz"),
    is_conjugate=True,
)


NO_TABLE = "(?s)Expected a model that reads the rows it draws in plate 'cells'.*subsample=index"


def of_loader(x):
    with pyro.plate("cells", ALL, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


add(
    "a loader's batch as a part of a plate",
    of_loader,
    (X,),
    row_evidence(X),
    scale=ALL / ROWS,
    brute_force=None,
    refused={
        "FactorizedGuide setup": NO_TABLE,
        "measure_gaps": NO_TABLE,
        "refine": NO_TABLE,
        "sbc": NO_TABLE,
        "posterior_predictive": "(?s)Expected the same rows in every draw",
        "to_arviz": "(?s)Expected the same rows in every draw",
    },
    is_conjugate=True,
)


def data_as_rows(x):
    with pyro.plate("data", len(x), subsample=x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


WRONG_ROWS = dict(evidence=np.zeros(ROWS), brute_force=None, refused={"setup": "(?s)subsample|positions"})

add("data in the place of positions", data_as_rows, (X,), **WRONG_ROWS)
add("counts in the place of positions", data_as_rows, (torch.tensor([3, 0, 7, 1, 9, 2]),), **WRONG_ROWS)
add("negative positions", data_as_rows, (torch.tensor([3, 0, -1, 1, 4, 2]),), **WRONG_ROWS)

WEIGHT = torch.tensor([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.3]])


class Decoder(PyroModule):
    """A linear decoder behind layers that are the identity in evaluation mode, if nothing has moved."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(WEIGHT)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            flat = self.layer(z.reshape(-1, 2))
            pyro.sample("x", dist.Normal(self.linear(flat).reshape(*z.shape[:-1], 3), NOISE).to_event(1), obs=x)


OF_DECODER = [linear_normal(x, array(WEIGHT), NOISE) for x in array(TABLE)]

add_made("dropout in a decoder", lambda: Decoder(nn.Dropout(0.5)), (TABLE,), OF_DECODER)


def unmoved():
    """A batch normalization that is the identity until its running moments move."""
    layer = nn.BatchNorm1d(2)
    with torch.no_grad():
        layer.weight.fill_((1 + layer.eps) ** 0.5)
    return layer


add_made("batch normalization in a decoder", lambda: Decoder(unmoved()), (TABLE,), OF_DECODER)
