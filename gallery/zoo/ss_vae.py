r"""A semi-supervised variational autoencoder: a few images have labels.

.. math:: y_n \sim \mathrm{Categorical}(1/10), \quad z_n \sim N(0, I_K), \qquad
          x_n \sim \mathrm{Bernoulli}(\mathrm{decoder}(z_n, y_n)), \quad l_n \sim \mathrm{Categorical}(0.99\ \text{at}\ y_n)

Kingma, Rezende, Mohamed and Welling, "Semi-Supervised Learning with Deep Generative Models", 2014; after Pyro's example
``ss_vae_M2``, whose guide is :math:`q(y \mid x) q(z \mid x, y)`. A label is a reading of the class that is right in 99 of 100
cases, and is masked where there is none. The class is summed out. Images are the 8 by 8 digits of scikit-learn.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from sklearn.datasets import load_digits
from torch import nn

from gallery.zoo import Problem

NUM_IMAGES, NUM_LABELLED, NUM_CLASSES, NUM_LATENTS, WIDTH = 200, 60, 10, 4, 32


def data():
    """Images ``[N, 64]`` of zeros and ones, labels ``[N]`` and which of them are known ``[N]``."""
    digits = load_digits()
    x = (torch.tensor(digits.data[:NUM_IMAGES]) >= 8).float()
    return x, torch.tensor(digits.target[:NUM_IMAGES]), torch.arange(NUM_IMAGES) < NUM_LABELLED


class SemiSupervised(nn.Module):
    """The model's decoder and the guide's encoders."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(NUM_LATENTS + NUM_CLASSES, WIDTH), nn.Softplus(), nn.Linear(WIDTH, 64))
        # Encoders read the label beside the image, zeros where there is none.
        self.encoder_y = nn.Sequential(nn.Linear(64 + NUM_CLASSES, WIDTH), nn.Softplus(), nn.Linear(WIDTH, NUM_CLASSES))
        self.encoder_z = nn.Sequential(
            nn.Linear(64 + NUM_CLASSES, WIDTH), nn.Softplus(), nn.Linear(WIDTH, 2 * NUM_LATENTS)
        )

    def model(self, x, labels, known):
        pyro.module("decoder", self.decoder)
        reading = (0.99 * torch.eye(NUM_CLASSES) + 0.01 / NUM_CLASSES).log()
        with pyro.plate("images", len(x)):
            prior = dist.Categorical(torch.ones(NUM_CLASSES) / NUM_CLASSES)
            y = pyro.sample("y", prior, infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_LATENTS), 1.0).to_event(1))
            with poutine.mask(mask=known):
                pyro.sample("label", dist.Categorical(logits=reading[y]), obs=labels)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(_beside(z, _one_hot(y)))).to_event(1), obs=x)

    def guide(self, x, labels, known):
        pyro.module("encoders", nn.ModuleList([self.encoder_y, self.encoder_z]))
        with pyro.plate("images", len(x)):
            read = torch.cat([x, _one_hot(labels) * known.unsqueeze(-1)], -1)
            y = pyro.sample("y", dist.Categorical(logits=self.encoder_y(read)), infer={"enumerate": "parallel"})
            loc, scale = self.encoder_z(_beside(x, _one_hot(y))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


def _one_hot(y):
    return nn.functional.one_hot(y, NUM_CLASSES).float()


def _beside(left, right):
    shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
    return torch.cat([left.expand(*shape, -1), right.expand(*shape, -1)], -1)


def problem() -> Problem:
    return Problem(
        origin="example `ss_vae_M2`",
        rows=f"{NUM_IMAGES} images",
        make_model=lambda: SemiSupervised().model,
        args=data(),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=400,
        lr=0.01,
        make_elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )
