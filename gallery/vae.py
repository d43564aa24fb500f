r"""A variational autoencoder, as in Pyro's tutorial, with its hand-written guide beside ours.

.. math:: z_n \sim N(0, I_K), \qquad x_n \mid z_n \sim \mathrm{Bernoulli}(\mathrm{decoder}(z_n))

The data are scikit-learn's 8 by 8 digits in black and white. Kingma and Welling, "Auto-Encoding Variational Bayes", 2014,
https://arxiv.org/abs/1312.6114; Pyro's tutorial, https://pyro.ai/examples/vae.html.

Encoder and decoder are what the tutorial has: modules of one hidden layer, and the methods ``model`` and ``guide`` that a
Pyro program of this kind consists of. The amortized guide needs the hidden layer of the encoder alone; heads for location
and scale, sample statement and plate are derived from the model.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoCallable
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_avi as avi
from gallery import Table, compare

NUM_LATENTS, WIDTH, NUM_PIXELS = 8, 64, 64


def data(num_rows: int = 1797) -> Tensor:
    """Images ``[N, 64]`` of zeros and ones."""
    return (torch.tensor(load_digits().data[:num_rows]) >= 8).float()


def hidden_layer():
    return nn.Sequential(nn.Linear(NUM_PIXELS, WIDTH), nn.Softplus())


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = hidden_layer()
        self.loc, self.log_scale = nn.Linear(WIDTH, NUM_LATENTS), nn.Linear(WIDTH, NUM_LATENTS)

    def forward(self, x):
        hidden = self.hidden(x)
        return self.loc(hidden), self.log_scale(hidden).exp()


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(NUM_LATENTS, WIDTH), nn.Softplus(), nn.Linear(WIDTH, NUM_PIXELS))
        self.encoder = Encoder()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(NUM_LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = self.encoder(x)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))


def guides(seed: int = 0):
    def vae():
        torch.manual_seed(seed)
        return VAE()

    by_hand = vae()
    return {
        "by hand": AutoCallable(by_hand.model, by_hand.guide),
        "constant": avi.ConstantGuide(vae().model),
        "amortized": avi.AmortizedGuide(vae().model, encoder=hidden_layer()),
        "factorized": avi.FactorizedGuide(vae().model),
    }


def run(*, num_rows: int = 1797, num_steps: int = 6000, num_samples: int = 100) -> Table:
    """Train the tutorial's guide and the three."""
    return compare(guides(), data(num_rows), num_steps=num_steps, num_samples=num_samples, lr=0.01)


if __name__ == "__main__":
    print(run())
