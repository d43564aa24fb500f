r"""Hierarchical logistic regression: every group has an intercept of its own.

.. math:: a_g \sim N(\mu, \tau^2), \qquad y_i \mid a \sim \mathrm{Bernoulli}(\mathrm{logit}^{-1}(a_{g(i)} + x_i^\top b))

The workhorse for binary outcomes that come in groups: voters in states, pupils in schools, patients in hospitals. Gelman
and Hill, "Data Analysis Using Regression and Multilevel/Hierarchical Models", 2007, chapter 14.

The rows are the groups, and the observations sit in another plate with an index into them. No observed value belongs to a
single group, so the amortized guide is told what to read: a summary of the group's members, whatever their number.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare, correlation


def data(num_rows: int = 200, num_columns: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Covariates ``[M, D]``, the group ``[M]`` and outcome ``[M]`` of each observation, and the intercepts ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    intercept = -0.5 + torch.randn(num_rows, generator=generator)
    sizes = torch.randint(3, 40, (num_rows,), generator=generator)
    group = torch.arange(num_rows).repeat_interleave(sizes)
    x = torch.randn(len(group), num_columns, generator=generator)
    logits = intercept[group] + x @ torch.linspace(-1.0, 1.0, num_columns)
    return x, group, torch.bernoulli(logits.sigmoid(), generator=generator), intercept


def model(x, group, num_groups, y=None):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    slopes = pyro.sample("slopes", dist.Normal(0.0, 2.0).expand([x.shape[-1]]).to_event(1))
    with pyro.plate("groups", num_groups):
        intercept = pyro.sample("intercept", dist.Normal(mean, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=intercept[group] + x @ slopes), obs=y)


def summary(x, group, num_groups, y):
    """How many members a group has, the log-odds of success among them, and the means of their covariates."""
    count = x.new_zeros(num_groups).index_add(0, group, torch.ones_like(y))
    successes = x.new_zeros(num_groups).index_add(0, group, y)
    means = x.new_zeros(num_groups, x.shape[-1]).index_add(0, group, x) / count.unsqueeze(-1)
    log_odds = ((successes + 0.5) / (count - successes + 0.5)).log()
    return torch.cat([torch.stack([count.log(), log_odds], -1), means], -1)


def guides():
    return {
        "constant": avi.ConstantGuide(model, plate="groups"),
        "amortized": avi.AmortizedGuide(model, plate="groups", inputs=summary),
        "factorized": avi.FactorizedGuide(model, plate="groups"),
    }


def run(*, num_rows: int = 200, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is the correlation of the intercepts' posterior means with the true ones."""
    x, group, y, intercept = data(num_rows)
    columns = {"correlation": correlation("intercept", intercept)}
    return compare(
        guides(), x, group, num_rows, y, num_steps=num_steps, num_samples=num_samples, lr=0.03, columns=columns
    )


if __name__ == "__main__":
    print(run())
