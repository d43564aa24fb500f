"""A family as a user writes one: what a family says of itself is all that the library knows of it."""

import math

import pyro.distributions as dist
import torch

from pyro_avi.families import Family

# Euler's constant, which is the mean of a standard Gumbel variable.
EULER = 0.5772156649015329


class SkewedFamily(Family):
    """Independent Gumbel variables: locations and log scales, ``P = 2 K``; with a closed-form quantile."""

    def num_parameters(self, num_latents):
        return 2 * num_latents

    def initial(self, loc, scale):
        spread = torch.as_tensor(scale).to(loc).expand_as(loc) * math.sqrt(6) / math.pi
        return torch.cat([loc - EULER * spread, spread.log()], -1)

    def distribution(self, parameters):
        loc, log_scale = parameters.chunk(2, -1)
        return dist.Gumbel(loc, log_scale.exp()).to_event(1)

    def quantile(self, parameters, q):
        loc, log_scale = parameters.chunk(2, -1)
        q = q.to(parameters).reshape(q.shape + (1,) * loc.dim())
        return loc - log_scale.exp() * (-q.log()).log()

    def settings(self):
        return {}
