r"""Rates of failure of pumps that were watched for different times.

.. math:: \alpha \sim \mathrm{Exponential}(1), \quad \beta \sim \mathrm{Gamma}(0.1, 1), \quad
          \lambda_n \sim \mathrm{Gamma}(\alpha, \beta), \qquad x_n \sim \mathrm{Poisson}(\lambda_n t_n)

George, Makov and Smith, "Conjugate Likelihood Distributions", 1993. The exposures are arguments of the model that are not
observed at any site; a guide that reads the counts alone cannot tell a rate. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_PUMPS = 60


def data():
    """Exposures and counts, each ``[N]``."""
    with seeded():
        exposure = (0.5 + 1.5 * torch.randn(NUM_PUMPS)).exp() * 5
        rate = dist.Gamma(1.0, 1.0).sample((NUM_PUMPS,))
        return exposure, dist.Poisson(rate * exposure).sample()


def model(exposure, x):
    shape = pyro.sample("shape", dist.Exponential(1.0))
    inverse_scale = pyro.sample("inverse_scale", dist.Gamma(0.1, 1.0))
    with pyro.plate("pumps", len(x)):
        rate = pyro.sample("rate", dist.Gamma(shape, inverse_scale))
        pyro.sample("x", dist.Poisson(rate * exposure), obs=x)


def problem() -> Problem:
    return Problem(
        origin="BUGS' example `pumps`",
        rows=f"{NUM_PUMPS} pumps",
        make_model=lambda: model,
        args=data(),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
    )
