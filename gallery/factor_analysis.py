r"""Factor analysis: many measurements of a row are explained by a few factors.

.. math:: z_n \sim N(0, I_K), \qquad x_n \mid z_n \sim N(W z_n + \mu, \mathrm{diag}(\sigma^2))

with priors on the loadings :math:`W`, the means and the noise. Psychology has used it since tests of ability were first
scored; it is linear dimension reduction in biology, marketing and econometrics. Bartholomew, Knott and Moustaki, "Latent
Variable Models and Factor Analysis", 3rd ed., 2011.

Given the loadings, the posterior mean of a row is linear in the row and its covariance is the same for all rows. An encoder
that is the identity, followed by the guide's linear head, therefore contains the best factors: amortization costs nothing.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_avi as avi
from gallery import Table, compare, correlation

NUM_FACTORS = 3


def data(num_rows: int = 500, num_columns: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Measurements ``x [N, D]`` and their noiseless values ``[N, D]``."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(num_columns, NUM_FACTORS, generator=generator)
    noise = 0.5 + torch.rand(num_columns, generator=generator)
    signal = torch.randn(num_rows, NUM_FACTORS, generator=generator) @ loadings.T
    return signal + noise * torch.randn(num_rows, num_columns, generator=generator), signal


def model(x):
    num_rows, num_columns = x.shape
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0).expand([num_columns]).to_event(1))
    loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([num_columns, NUM_FACTORS]).to_event(2))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0).expand([num_columns]).to_event(1))
    with pyro.plate("data", num_rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([NUM_FACTORS]).to_event(1))
        signal = pyro.deterministic("signal", mean + z @ loadings.T, event_dim=1)
        pyro.sample("x", dist.Normal(signal, noise).to_event(1), obs=x)


def guides():
    return {
        "constant": avi.ConstantGuide(model),
        "amortized": avi.AmortizedGuide(model, encoder=nn.Identity()),
        "factorized": avi.FactorizedGuide(model),
    }


def run(*, num_rows: int = 500, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of the denoised values with the noiseless ones."""
    x, signal = data(num_rows)
    columns = {"correlation": correlation("signal", signal)}
    # Every latent and its factor are normal, so that most divergences have a closed form.
    options = {"lr": 0.05, "elbo": TraceMeanField_ELBO(), "columns": columns}
    return compare(guides(), x, num_steps=num_steps, num_samples=num_samples, **options)


if __name__ == "__main__":
    print(run())
