r"""Mixture of factor analyzers: clusters with a low-dimensional shape each.

.. math:: c_n \sim \mathrm{Categorical}(\pi), \qquad z_n \sim N(0, I_K), \qquad
          x_n \mid c_n, z_n \sim N(m_{c_n} + W_{c_n} z_n, \sigma^2 I)

A Gaussian mixture whose covariances have few parameters: used for clustering images, expression profiles and spectra.
Ghahramani and Hinton, "The EM Algorithm for Mixtures of Factor Analyzers", 1996.

The model enumerates each row's cluster, so that ``TraceEnum_ELBO`` sums over it and the guides see the continuous latent
alone. Weights, means, loadings and noise are point estimates by Pyro's ``AutoDelta``, for which the marginal likelihood has
a closed form: a mixture of normals with covariances :math:`W_c W_c^\top + \sigma^2 I`.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor

import pyro_avi as avi
from gallery import Table, compare

NUM_COMPONENTS, NUM_FACTORS = 3, 2


def data(num_rows: int = 400, num_columns: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ``x [N, D]`` and their clusters ``[N]``."""
    generator = torch.Generator().manual_seed(seed)
    locs = 3.0 * torch.randn(NUM_COMPONENTS, num_columns, generator=generator)
    loadings = torch.randn(NUM_COMPONENTS, num_columns, NUM_FACTORS, generator=generator)
    component = torch.randint(NUM_COMPONENTS, (num_rows,), generator=generator)
    z = torch.randn(num_rows, NUM_FACTORS, 1, generator=generator)
    noise = 0.7 * torch.randn(num_rows, num_columns, generator=generator)
    return locs[component] + (loadings[component] @ z).squeeze(-1) + noise, component


@config_enumerate
def model(x):
    num_rows, num_columns = x.shape
    weights = pyro.sample("weights", dist.Dirichlet(2.0 * torch.ones(NUM_COMPONENTS)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", NUM_COMPONENTS):
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([num_columns]).to_event(1))
        loadings = pyro.sample("loadings", dist.Normal(0.0, 1.0).expand([num_columns, NUM_FACTORS]).to_event(2))
    with pyro.plate("data", num_rows):
        component = pyro.sample("component", dist.Categorical(weights))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([NUM_FACTORS]).to_event(1))
        mean = locs[component] + (loadings[component] @ z.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(mean, scale.unsqueeze(-1)).to_event(1), obs=x)


def far_apart(x: Tensor) -> Tensor:
    """As many rows as there are clusters, each as far from the others as can be."""
    chosen = x[:1]
    while len(chosen) < NUM_COMPONENTS:
        chosen = torch.cat([chosen, x[torch.cdist(x, chosen).amin(-1).argmax()].unsqueeze(0)])
    return chosen


def guides(x):
    torch.manual_seed(0)
    loadings = 0.3 * torch.randn(NUM_COMPONENTS, x.shape[-1], NUM_FACTORS)
    init = init_to_value(values={"locs": far_apart(x), "loadings": loadings})

    def point_estimates(model):
        return AutoDelta(poutine.block(model, hide=["component"]), init_loc_fn=init)

    return {
        "constant": avi.ConstantGuide(model, global_guide=point_estimates),
        "amortized": avi.AmortizedGuide(model, global_guide=point_estimates),
        "factorized": avi.FactorizedGuide(model, global_guide=point_estimates),
    }


def log_joint(guide, args, num_samples) -> float:
    """What the ELBO bounds: the log density of the point estimates and of the data given them, in closed form."""
    (x,) = args
    names = ("weights", "scale", "locs", "loadings")
    estimates = {name: guide.median(x)[name] for name in names}
    trace = poutine.trace(poutine.condition(model, data=estimates)).get_trace(x)
    trace.compute_log_prob(lambda name, site: name in names)
    prior = sum(trace.nodes[name]["log_prob_sum"].item() for name in names)
    weights, scale, locs, loadings = estimates.values()
    covariance = loadings @ loadings.mT + scale**2 * torch.eye(x.shape[-1])
    by_component = dist.MultivariateNormal(locs, covariance).log_prob(x.unsqueeze(-2)) + weights.log()
    return prior + by_component.logsumexp(-1).sum().item()


def run(*, num_rows: int = 400, num_steps: int = 2000, num_samples: int = 100) -> Table:
    """Train the three guides; the last column is what each ELBO bounds at that guide's own point estimates."""
    x, _ = data(num_rows)
    columns = {"log p(x, theta)": log_joint}
    options = {"lr": 0.05, "encoder_lr": 0.01, "elbo": TraceEnum_ELBO(max_plate_nesting=1), "columns": columns}
    return compare(guides(x), x, num_steps=num_steps, num_samples=num_samples, **options)


if __name__ == "__main__":
    print(run())
