r"""Batting averages, partially pooled.

.. math:: m \sim U(0, 1), \quad \kappa \sim \mathrm{Pareto}(1, 1.5), \quad
          \phi_n \sim \mathrm{Beta}(m \kappa, (1 - m) \kappa), \qquad y_n \sim \mathrm{Binomial}(45, \phi_n)

The first 45 at bats of 18 players in 1970: Efron and Morris, "Data Analysis Using Stein's Estimator and its
Generalizations", 1975; after Pyro's example ``baseball``.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem

HITS = (18, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7)


def model(at_bats, hits):
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("players", len(hits)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits)


def problem() -> Problem:
    hits = torch.tensor(HITS, dtype=torch.float32)
    return Problem(
        origin="example `baseball`",
        rows="18 players",
        make_model=lambda: model,
        args=(torch.full_like(hits, 45.0), hits),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
    )
