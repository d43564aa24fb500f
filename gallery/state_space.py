r"""Stochastic volatility: a state-space model of many series whose variance wanders.

.. math:: h_{n1} \sim N\left(\mu, \tfrac{\sigma^2}{1 - \phi^2}\right), \qquad
          h_{nt} \mid h_{n,t-1} \sim N(\mu + \phi (h_{n,t-1} - \mu), \sigma^2), \qquad
          y_{nt} \mid h_{nt} \sim N(0, e^{h_{nt}})

Returns of assets are nearly uncorrelated, but calm and turbulent days come in spells; risk is priced by the hidden path of
the log-variance. Kim, Shephard and Chib, "Stochastic Volatility: Likelihood Inference and Comparison with ARCH Models", 1998.

The rows are the series, and the whole path of a series is one latent of T coordinates: the autoregression's joint normal.
The encoder reads the logarithms of the squared returns, the transform under which the model is nearly linear.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare, correlation


def data(num_rows: int = 200, num_times: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns ``[N, T]`` and the logarithms of their variances ``[N, T]``."""
    generator = torch.Generator().manual_seed(seed)
    mean, persistence, scale = -0.5, 0.95, 0.4
    steps = scale * torch.randn(num_times, num_rows, generator=generator)
    path = [mean + steps[0] / (1 - persistence**2) ** 0.5]
    for step in steps[1:]:
        path.append(mean + persistence * (path[-1] - mean) + step)
    log_variance = torch.stack(path, -1)
    return (log_variance / 2).exp() * torch.randn(num_rows, num_times, generator=generator), log_variance


def model(returns):
    num_series, num_times = returns.shape
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    persistence = pyro.sample("persistence", dist.Beta(10.0, 1.5))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    time = torch.arange(num_times)
    lag = (time.unsqueeze(-1) - time).abs()
    covariance = scale**2 / (1 - persistence**2) * persistence**lag
    with pyro.plate("series", num_series):
        path = dist.MultivariateNormal(mean.expand(num_times), covariance)
        log_variance = pyro.sample("log_variance", path)
        pyro.sample("returns", dist.Normal(0.0, (log_variance / 2).exp()).to_event(1), obs=returns)


def log_squares(returns):
    return (returns.square() + 1e-3).log()


def guides():
    return {
        "constant": avi.ConstantGuide(model),
        "amortized": avi.AmortizedGuide(model, inputs=log_squares),
        "factorized": avi.FactorizedGuide(model),
    }


def run(*, num_rows: int = 200, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of the log-variances' posterior means with the true ones."""
    returns, log_variance = data(num_rows)
    columns = {"correlation": correlation("log_variance", log_variance)}
    return compare(
        guides(), returns, num_steps=num_steps, num_samples=num_samples, lr=0.03, encoder_lr=0.005, columns=columns
    )


if __name__ == "__main__":
    print(run())
