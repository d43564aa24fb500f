r"""Eight schools: effects of coaching, with known standard errors.

.. math:: \mu \sim N(0, 10^2), \quad \tau \sim \mathrm{HalfCauchy}(25), \quad \eta_n \sim N(0, 1), \qquad
          y_n \sim N(\mu + \tau \eta_n, \sigma_n^2)

Rubin, "Estimation in Parallel Randomized Experiments", 1981; after Pyro's example ``eight_schools``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


def model(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(25.0)))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def problem() -> Problem:
    return Problem(
        origin="example `eight_schools`",
        rows="8 schools",
        make_model=lambda: model,
        args=(torch.tensor(EFFECTS), torch.tensor(ERRORS)),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
    )
