r"""A multilevel model: every county has a level and a slope of its own.

.. math:: a_g \sim N(\mu_a, \tau_a^2), \quad b_g \sim N(\mu_b, \tau_b^2), \qquad
          y_i \sim N(a_{g(i)} + b_{g(i)} x_i, \sigma^2)

Log radon in houses of counties, by floor: Gelman and Hill, "Data Analysis Using Regression and Multilevel/Hierarchical
Models", 2007, chapter 12; after Pyro's tutorial on Bayesian hierarchical linear models. Data are simulated.

The rows are the counties, and the observations sit in another plate, so that an amortized guide has to be told what it reads.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_COUNTIES = 40


def data():
    """County and floor of every house, and its log radon, each ``[M]``."""
    with seeded():
        sizes = torch.randint(2, 20, (NUM_COUNTIES,))
        county = torch.arange(NUM_COUNTIES).repeat_interleave(sizes)
        floor = torch.bernoulli(torch.full((len(county),), 0.3))
        level, slope = 1.5 + 0.4 * torch.randn(NUM_COUNTIES), -0.7 + 0.3 * torch.randn(NUM_COUNTIES)
        return county, floor, level[county] + slope[county] * floor + 0.7 * torch.randn(len(county))


def model(county, floor, y):
    level_mean = pyro.sample("level_mean", dist.Normal(0.0, 2.0))
    level_scale = pyro.sample("level_scale", dist.HalfNormal(1.0))
    slope_mean = pyro.sample("slope_mean", dist.Normal(0.0, 2.0))
    slope_scale = pyro.sample("slope_scale", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("counties", NUM_COUNTIES):
        level = pyro.sample("level", dist.Normal(level_mean, level_scale))
        slope = pyro.sample("slope", dist.Normal(slope_mean, slope_scale))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(level[county] + slope[county] * floor, noise), obs=y)


def summary(county, floor, y):
    """By county ``[N, 4]``: log of one more than the number of houses on either floor, and the mean log radon there."""
    cell = 2 * county + floor.long()
    count = y.new_zeros(2 * NUM_COUNTIES).index_add(0, cell, torch.ones_like(y))
    total = y.new_zeros(2 * NUM_COUNTIES).index_add(0, cell, y)
    return torch.cat([count.log1p().view(-1, 2), (total / count.clamp(min=1)).view(-1, 2)], -1)


def problem() -> Problem:
    return Problem(
        origin="tutorial on hierarchical linear models",
        rows=f"{NUM_COUNTIES} counties",
        make_model=lambda: model,
        args=data(),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
        options={"plate": "counties"},
        inputs=summary,
    )
