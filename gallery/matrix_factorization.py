r"""Matrix factorization with side information: ratings of items by users of whom something is known.

.. math:: u_n \sim N(A^\top f_n, I_K), \qquad v_m \sim N(0, I_K), \qquad
          r_{nm} \mid u_n, v_m \sim N(u_n^\top v_m + b_m, \sigma^2) \quad \text{where rated}

Recommender systems predict the ratings that are missing, and a user's features :math:`f_n` (age, country, device) say
something before the first rating. Salakhutdinov and Mnih, "Probabilistic Matrix Factorization", 2008; Agarwal and Chen,
"Regression-based Latent Factor Models", 2009.

The users are the rows. The encoder reads a user's features, ratings, and which items were rated; the vectors of the items
are shared by all users and belong to the global latents.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare, correlation

NUM_FACTORS = 2


def data(num_rows: int = 300, num_items: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features ``[N, F]``, ratings ``[N, M]`` (0 where missing), which were given ``[N, M]``, and their means ``[N, M]``."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, 4, generator=generator)
    user = features @ torch.randn(4, NUM_FACTORS, generator=generator) / 2
    user = user + torch.randn(num_rows, NUM_FACTORS, generator=generator)
    item, bias = torch.randn(num_items, NUM_FACTORS, generator=generator), torch.randn(num_items, generator=generator)
    mean = user @ item.T + bias
    rated = torch.rand(num_rows, num_items, generator=generator) < 0.25
    ratings = mean + 0.5 * torch.randn(num_rows, num_items, generator=generator)
    return features, ratings.where(rated, 0.0), rated, mean


def model(features, ratings, rated):
    users = pyro.plate("users", ratings.shape[0], dim=-2)
    items = pyro.plate("items", ratings.shape[1], dim=-1)
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    map_shape = [features.shape[-1], NUM_FACTORS]
    feature_map = pyro.sample("feature_map", dist.Normal(0.0, 1.0).expand(map_shape).to_event(2))
    with items:
        bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
        item = pyro.sample("item", dist.Normal(0.0, 1.0).expand([NUM_FACTORS]).to_event(1))
    with users:
        user = pyro.sample("user", dist.Normal((features @ feature_map).unsqueeze(-2), 1.0).to_event(1))
    with users, items:
        mean = pyro.deterministic("rating_mean", (user * item).sum(-1) + bias, event_dim=0)
        with poutine.mask(mask=rated):
            pyro.sample("rating", dist.Normal(mean, noise), obs=ratings)


def profile(features, ratings, rated):
    return torch.cat([features, ratings, rated.to(ratings)], -1)


def guides():
    return {
        "constant": avi.ConstantGuide(model, plate="users"),
        "amortized": avi.AmortizedGuide(model, plate="users", inputs=profile),
        "factorized": avi.FactorizedGuide(model, plate="users"),
    }


def run(*, num_rows: int = 300, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of all predicted ratings, missing ones too, with the truth."""
    features, ratings, rated, mean = data(num_rows)
    columns = {"correlation": correlation("rating_mean", mean)}
    options = {"lr": 0.05, "encoder_lr": 0.01, "columns": columns}
    return compare(guides(), features, ratings, rated, num_steps=num_steps, num_samples=num_samples, **options)


if __name__ == "__main__":
    print(run())
