r"""A deep exponential family with gamma layers on counts.

.. math:: u_{nj} \sim \mathrm{Gamma}(0.3, 0.3), \quad
          z_{nk} \sim \mathrm{Gamma}(0.3, 0.3 / (u_n^\top V)_k), \qquad x_{nd} \sim \mathrm{Poisson}((z_n^\top W)_d)

with gamma weights :math:`V, W`. Ranganath, Tang, Charlin and Blei, "Deep Exponential Families", 2015; after Pyro's example
``sparse_gamma_def``. Counts are the pixels of scikit-learn's 8 by 8 digits, 0 to 16.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from sklearn.datasets import load_digits

from gallery.zoo import Problem

NUM_IMAGES, TOP, BOTTOM = 60, 3, 6


def data():
    """Counts ``[N, 64]``."""
    return torch.tensor(load_digits().data[:NUM_IMAGES], dtype=torch.float32)


def model(x):
    shape = torch.tensor(0.3)
    top_weights = pyro.sample("top_weights", dist.Gamma(0.1, 0.3).expand([TOP, BOTTOM]).to_event(2))
    weights = pyro.sample("weights", dist.Gamma(0.1, 0.3).expand([BOTTOM, x.shape[-1]]).to_event(2))
    with pyro.plate("images", len(x)):
        top = pyro.sample("top", dist.Gamma(shape, shape).expand([TOP]).to_event(1))
        bottom = pyro.sample("bottom", dist.Gamma(shape, shape / (top @ top_weights).clamp(min=1e-6)).to_event(1))
        pyro.sample("x", dist.Poisson((bottom @ weights).clamp(min=1e-6)).to_event(1), obs=x)


def problem() -> Problem:
    return Problem(
        origin="example `sparse_gamma_def`",
        rows=f"{NUM_IMAGES} images",
        make_model=lambda: model,
        args=(data(),),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=600,
        lr=0.05,
        encoder_lr=0.01,
    )
