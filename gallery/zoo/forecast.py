r"""A level that drifts, by ``pyro.contrib.forecast``, with the guide that its ``Forecaster`` takes.

.. math:: d_t \sim N(0, \delta^2), \qquad y_t \sim \mathrm{StudentT}(4, l + d_1 + ... + d_t + \beta^\top x_t, \sigma)

Monthly passengers with a trend and a season; after Pyro's tutorial on forecasting. The drift has a plate of times, but what is
observed is one event of the whole series, so that nothing is a row's own: to every guide all latents are global. Data are
simulated.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.contrib.forecast import ForecastingModel
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_MONTHS = 48


class Level(ForecastingModel):
    """A drifting level and a season."""

    def model(self, zero_data, covariates):
        start = pyro.sample("start", dist.Normal(0.0, 5.0))
        season = pyro.sample("season", dist.Normal(0.0, 1.0).expand([covariates.shape[-1]]).to_event(1))
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-2.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(-2.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, drift_scale))
        level = start.unsqueeze(-1) + drift.cumsum(-1) + (covariates * season).sum(-1)
        self.predict(dist.StudentT(4.0, 0.0, noise.unsqueeze(-1)), level.unsqueeze(-1))


def data():
    """The series ``[T, 1]`` and its season ``[T, 2]``."""
    with seeded():
        angle = 2 * math.pi * torch.arange(NUM_MONTHS) / 12
        covariates = torch.stack([angle.sin(), angle.cos()], -1)
        level = 3.0 + 0.1 * torch.randn(NUM_MONTHS).cumsum(0) + covariates @ torch.tensor([0.5, -0.3])
        return (level + 0.1 * torch.randn(NUM_MONTHS)).unsqueeze(-1), covariates


def problem() -> Problem:
    return Problem(
        origin="`pyro.contrib.forecast`",
        rows=f"{NUM_MONTHS} months",
        make_model=Level,
        args=data(),
        pyro_guide="AutoNormal",
        make_pyro_guide=AutoNormal,
        num_steps=1000,
        lr=0.05,
    )
