r"""Gene expression of single cells: a variational autoencoder of counts with a size of every cell.

.. math:: z_n \sim N(0, I_K), \quad \ell_n \sim \mathrm{LogNormal}(m, s^2), \qquad
          x_{nd} \sim \mathrm{NegativeBinomial}(\text{mean}\ \ell_n\, \mathrm{softmax}(\mathrm{decoder}(z_n))_d, \theta_d)

Lopez, Regier, Cole, Jordan and Yosef, "Deep generative modeling for single-cell transcriptomics", 2018; after Pyro's example
``scanvi``, whose guide reads logarithms of counts. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import init_to_median
from torch import nn
from torch.distributions import constraints

from gallery.zoo import Problem, seeded

NUM_CELLS, NUM_GENES, NUM_LATENTS, WIDTH = 150, 30, 3, 16


def data():
    """Counts ``[N, D]`` of three kinds of cells."""
    with seeded():
        kinds = torch.randn(3, NUM_GENES).mul(1.5).softmax(-1)
        size = (6.0 + 0.5 * torch.randn(NUM_CELLS, 1)).exp()
        mean = size * kinds[torch.randint(3, (NUM_CELLS,))]
        return dist.Poisson(dist.Gamma(5.0, 5.0 / mean).sample()).sample()


class CountVAE(nn.Module):
    """The model's decoder and the guide's encoder."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(NUM_LATENTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, NUM_GENES))
        self.encoder = nn.Sequential(nn.Linear(NUM_GENES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2 * NUM_LATENTS + 2))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        dispersion = pyro.param("dispersion", torch.ones(NUM_GENES), constraint=constraints.positive)
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(NUM_LATENTS), 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(6.0, 1.0))
            mean = size.unsqueeze(-1) * self.decoder(z).softmax(-1)
            logits = mean.add(1e-6).log() - dispersion.log()
            pyro.sample("x", dist.NegativeBinomial(dispersion, logits=logits).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("cells", len(x)):
            loc, scale, size = self.encoder(x.log1p()).split([NUM_LATENTS, NUM_LATENTS, 2], -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))
            pyro.sample("size", dist.LogNormal(6.0 + size[:, 0], nn.functional.softplus(size[:, 1])))


def problem() -> Problem:
    return Problem(
        origin="example `scanvi`",
        rows=f"{NUM_CELLS} cells",
        make_model=lambda: CountVAE().model,
        args=(data(),),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=600,
        lr=0.02,
        # At the default, Pyro's too, sizes of cells begin at 1 and not in the hundreds.
        options={"init_loc_fn": init_to_median},
    )
