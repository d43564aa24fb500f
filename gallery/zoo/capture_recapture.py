r"""Capture and recapture, the Cormack-Jolly-Seber model, with animals that differ.

.. math:: \epsilon_n \sim N(0, \tau^2), \qquad a_{nt} \mid a_{n,t-1} \sim \mathrm{Bernoulli}(\phi\, a_{n,t-1}), \quad
          y_{nt} \sim \mathrm{Bernoulli}(\mathrm{logit}^{-1}(\mu + \epsilon_n)\, a_{nt})

Whether an animal is alive is summed out, year by year. Kery and Schaub, "Bayesian Population Analysis using WinBUGS", 2012;
after Pyro's example ``capture_recapture``. All animals are caught in the first year. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_ANIMALS, NUM_YEARS = 80, 6


def data():
    """Whether an animal was seen in each year after the first, ``[N, T]``."""
    with seeded():
        seen = (0.3 + 0.8 * torch.randn(NUM_ANIMALS)).sigmoid()
        alive, y = torch.ones(NUM_ANIMALS), []
        for _ in range(NUM_YEARS):
            alive = torch.bernoulli(0.8 * alive)
            y.append(torch.bernoulli(seen * alive))
        return torch.stack(y, -1)


def model(y):
    survival = pyro.sample("survival", dist.Uniform(0.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(0.0, 1.5))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("animals", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, scale))
        alive = torch.ones(())
        for t in pyro.markov(range(y.shape[1])):
            alive = pyro.sample(f"alive_{t}", dist.Bernoulli(survival * alive), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Bernoulli((mean + effect).sigmoid() * alive), obs=y[:, t])


def problem() -> Problem:
    return Problem(
        origin="example `capture_recapture`",
        rows=f"{NUM_ANIMALS} animals",
        make_model=lambda: model,
        args=(data(),),
        pyro_guide="AutoNormal",
        make_pyro_guide=lambda model: AutoNormal(poutine.block(model, hide_fn=_is_alive)),
        num_steps=300,
        lr=0.05,
        make_elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )


def _is_alive(site):
    return site["name"].startswith("alive_")
