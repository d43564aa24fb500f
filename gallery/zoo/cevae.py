r"""A causal effect variational autoencoder, from ``pyro.contrib.cevae``, with the guide of that package.

.. math:: z_n \sim N(0, I_K), \qquad x_n, t_n, y_n \mid z_n \sim p(x \mid z)\, p(t \mid z)\, p(y \mid t, z)

Features, treatment and outcome of a person share a confounder. Louizos and others, "Causal Effect Inference with Deep
Latent-Variable Models", 2017, https://arxiv.org/abs/1705.08821. Data are simulated.

The package's model hands its features to the plate as ``subsample=``, where Pyro expects positions of rows. The three guides
refuse that, so the plate is written anew here; networks, distributions and the guide are the package's.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.cevae import Guide, Model

from gallery.zoo import Problem, seeded

NUM_PERSONS = 200
CONFIG = {"feature_dim": 5, "latent_dim": 3, "hidden_dim": 16, "num_layers": 2, "outcome_dist": "normal"}


def data():
    """Features ``[N, D]``, treatments ``[N]`` and outcomes ``[N]``."""
    with seeded():
        z = torch.randn(NUM_PERSONS, 1)
        x = torch.tanh(z * torch.linspace(-2.0, 2.0, CONFIG["feature_dim"])) + 0.3 * torch.randn(
            NUM_PERSONS, CONFIG["feature_dim"]
        )
        t = dist.Bernoulli(logits=z.squeeze(-1)).sample()
        return x, t, z.squeeze(-1) + t + 0.3 * torch.randn(NUM_PERSONS)


class CEVAE(Model):
    """The package's model with a plate of all rows."""

    def forward(self, x, t, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.z_dist())
            pyro.sample("x", self.x_dist(z), obs=x)
            pyro.sample("t", self.t_dist(z), obs=t)
            pyro.sample("y", self.y_dist(t, z), obs=y)


def problem() -> Problem:
    return Problem(
        origin="`pyro.contrib.cevae`",
        rows=f"{NUM_PERSONS} persons",
        make_model=lambda: CEVAE(CONFIG),
        args=data(),
        pyro_guide="by hand",
        # Its readings of treatment and outcome serve new persons; in the bound they have no place.
        make_pyro_guide=lambda model: poutine.block(Guide(CONFIG), hide=["t", "y"]),
        num_steps=600,
        lr=0.01,
    )
