r"""Sparse regression with the horseshoe prior.

.. math:: \tau \sim \mathrm{HalfCauchy}(0.1), \quad \lambda_d \sim \mathrm{HalfCauchy}(1), \quad b_d \sim N(0, 1), \qquad
          y_n \sim N\left(\sum_d x_{nd} \tau \lambda_d b_d, \sigma^2\right)

Carvalho, Polson and Scott, "The horseshoe estimator for sparse signals", 2010; after Pyro's example ``sparse_regression``.
Every coefficient bears on every observation, so that the plate of coefficients has no observation: to every guide all latents
are global. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_ROWS, NUM_COLUMNS = 80, 20


def data():
    """Covariates ``[N, D]`` and outcomes ``[N]``; three coefficients are not zero."""
    with seeded():
        x = torch.randn(NUM_ROWS, NUM_COLUMNS)
        coefficients = torch.zeros(NUM_COLUMNS)
        coefficients[:3] = torch.tensor([2.0, -1.0, 1.0])
        return x, x @ coefficients + 0.5 * torch.randn(NUM_ROWS)


def model(x, y):
    overall = pyro.sample("overall", dist.HalfCauchy(torch.tensor(0.1)))
    noise = pyro.sample("noise", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("columns", x.shape[-1]):
        own = pyro.sample("own", dist.HalfCauchy(torch.tensor(1.0)))
        unit = pyro.sample("unit", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ (overall * own * unit), noise), obs=y)


def problem() -> Problem:
    return Problem(
        origin="example `sparse_regression`",
        rows=f"{NUM_COLUMNS} columns",
        make_model=lambda: model,
        args=data(),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
    )
