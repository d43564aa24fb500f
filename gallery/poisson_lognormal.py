r"""Poisson log-normal: correlated counts of several kinds at each place.

.. math:: \log r_n \sim N(\mu, \Sigma), \qquad y_{nj} \mid r_n \sim \mathrm{Poisson}(t_n r_{nj})

with a known effort :math:`t_n` and :math:`\Sigma` from scales and a correlation matrix of LKJ prior. Ecologists count
species on plots and read :math:`\Sigma` as which of them occur together; the same model serves RNA counts and insurance
claims. Aitchison and Ho, "The multivariate Poisson-log normal distribution", Biometrika 76, 1989; Chiquet, Mariadassou and
Robin, "The Poisson-Lognormal Model as a Versatile Framework for the Joint Analysis of Species Abundances", 2021.

Counts span orders of magnitude, so the encoder reads their logarithms, and the effort beside them.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare, correlation


def data(num_rows: int = 300, num_species: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ``[N, J]``, effort ``[N]`` and the logarithms of the rates ``[N, J]``."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.linspace(-1.0, 2.0, num_species)
    mixing = 0.5 * torch.randn(num_species, num_species, generator=generator)
    log_rate = mean + torch.randn(num_rows, num_species, generator=generator) @ mixing.T
    effort = 0.5 + torch.rand(num_rows, generator=generator)
    counts = torch.poisson(effort.unsqueeze(-1) * log_rate.exp(), generator=generator)
    return counts, effort, log_rate


def model(counts, effort):
    num_rows, num_species = counts.shape
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([num_species]).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0).expand([num_species]).to_event(1))
    correlation = pyro.sample("correlation", dist.LKJCholesky(num_species, 2.0))
    with pyro.plate("plots", num_rows):
        scale_tril = scale.unsqueeze(-1) * correlation
        log_rate = pyro.sample("log_rate", dist.MultivariateNormal(mean, scale_tril=scale_tril))
        rate = effort.unsqueeze(-1) * log_rate.exp()
        pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=counts)


def features(counts, effort):
    return torch.cat([counts.log1p(), effort.log().unsqueeze(-1)], -1)


def guides():
    return {
        "constant": avi.ConstantGuide(model),
        "amortized": avi.AmortizedGuide(model, inputs=features),
        "factorized": avi.FactorizedGuide(model),
    }


def run(*, num_rows: int = 300, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of the log-rates' posterior means with the true ones."""
    counts, effort, log_rate = data(num_rows)
    columns = {"correlation": correlation("log_rate", log_rate)}
    return compare(
        guides(),
        counts,
        effort,
        num_steps=num_steps,
        num_samples=num_samples,
        lr=0.05,
        encoder_lr=0.01,
        columns=columns,
    )


if __name__ == "__main__":
    print(run())
