r"""Attend, infer, repeat, small: images of none, one or two spots.

.. math:: k_{n1} \sim \mathrm{Bernoulli}(p), \quad k_{n2} \sim \mathrm{Bernoulli}(p\, k_{n1}), \quad
          w_{nj} \sim N(0, I_2), \qquad x_n \sim N\left(\sum_j k_{nj}\, \mathrm{spot}(w_{nj}), \sigma^2 I\right)

Whether there is a further object is drawn object by object, as are its places. Eslami and others, "Attend, Infer, Repeat: Fast
Scene Understanding with Generative Models", 2016, https://arxiv.org/abs/1603.08575; after Pyro's example ``air``, whose guide
draws objects with a network that reads the image. Here presence is summed out, and the place of an absent object has its prior.
Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from torch import nn

from gallery.zoo import Problem, seeded

NUM_IMAGES, SIDE, MOST, WIDTH = 100, 6, 2, 32


def spot(where):
    """A spot ``[..., SIDE * SIDE]`` around a place ``[..., 2]``."""
    axis = torch.linspace(-2.0, 2.0, SIDE)
    near = torch.exp(-((axis - where.unsqueeze(-1)) ** 2))
    return (near[..., 0, :, None] * near[..., 1, None, :]).flatten(-2)


def data():
    """Images ``[N, SIDE * SIDE]``."""
    with seeded():
        first = torch.bernoulli(torch.full((NUM_IMAGES, 1), 0.7))
        second = torch.bernoulli(0.7 * first)
        where = torch.randn(MOST, NUM_IMAGES, 2)
        return first * spot(where[0]) + second * spot(where[1]) + 0.2 * torch.randn(NUM_IMAGES, SIDE**2)


class AIR(nn.Module):
    """The guide's network; the model has none."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(SIDE**2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, MOST * 5))

    def model(self, x):
        further = pyro.sample("further", dist.Beta(1.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
        with pyro.plate("images", len(x)):
            present, mean = torch.ones(()), torch.zeros(())
            for j in range(MOST):
                present = pyro.sample(
                    f"present_{j}", dist.Bernoulli(further * present), infer={"enumerate": "parallel"}
                )
                where = pyro.sample(f"where_{j}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                mean = mean + present.unsqueeze(-1) * spot(where)
            pyro.sample("x", dist.Normal(mean, noise.unsqueeze(-1)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        further = pyro.param("further_loc_scale", torch.tensor([0.0, 0.1]))
        noise = pyro.param("noise_loc_scale", torch.tensor([-1.0, 0.1]))
        logit = dist.Normal(further[0], further[1].abs())
        pyro.sample("further", dist.TransformedDistribution(logit, dist.transforms.SigmoidTransform()))
        pyro.sample("noise", dist.LogNormal(noise[0], noise[1].abs()))
        with pyro.plate("images", len(x)):
            present = torch.ones(())
            for j, found in enumerate(self.encoder(x).chunk(MOST, -1)):
                odds = dist.Bernoulli(found[:, 4].sigmoid() * present)
                present = pyro.sample(f"present_{j}", odds, infer={"enumerate": "parallel"})
                factor = dist.Normal(found[:, :2], nn.functional.softplus(found[:, 2:4] - 2))
                pyro.sample(f"where_{j}", factor.to_event(1))


def problem() -> Problem:
    return Problem(
        origin="example `air`",
        rows=f"{NUM_IMAGES} images",
        make_model=lambda: AIR().model,
        args=(data(),),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=600,
        lr=0.02,
        make_elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )
