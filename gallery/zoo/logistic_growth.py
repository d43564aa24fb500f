r"""Growth curves of trees: a nonlinear model with effects of every tree.

.. math:: \log a_n \sim N(\mu_a, \tau_a^2), \quad \log m_n \sim N(\mu_m, \tau_m^2), \qquad
          y_{nt} \sim N\left(\frac{a_n}{1 + \exp(-(t - m_n) / s)}, \sigma^2\right)

Pinheiro and Bates, "Mixed-Effects Models in S and S-PLUS", 2000, chapter 8. Data are simulated, in decimetres and years.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_TREES = 50


def data():
    """Times ``[T]`` and sizes ``[N, T]``."""
    with seeded():
        times = torch.linspace(0.5, 8.0, 7)
        asymptote = (3.0 + 0.3 * torch.randn(NUM_TREES, 1)).exp()
        midpoint = (1.2 + 0.2 * torch.randn(NUM_TREES, 1)).exp()
        size = asymptote * ((times - midpoint) / 1.2).sigmoid()
        return times, size + 0.8 * torch.randn(NUM_TREES, len(times))


def model(times, y):
    mean = pyro.sample("mean", dist.Normal(torch.tensor([3.0, 1.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    steepness = pyro.sample("steepness", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("trees", len(y)):
        asymptote = pyro.sample("asymptote", dist.LogNormal(mean[0], scale[0])).unsqueeze(-1)
        midpoint = pyro.sample("midpoint", dist.LogNormal(mean[1], scale[1])).unsqueeze(-1)
        size = asymptote * ((times - midpoint) / steepness).sigmoid()
        pyro.sample("y", dist.Normal(size, noise).to_event(1), obs=y)


def problem() -> Problem:
    return Problem(
        origin="nonlinear mixed effects",
        rows=f"{NUM_TREES} trees",
        make_model=lambda: model,
        args=data(),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=1000,
        lr=0.05,
        encoder_lr=0.005,
    )
