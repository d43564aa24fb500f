r"""A hidden Markov model with effects of every animal.

.. math:: \epsilon_n \sim N(0, \tau^2), \qquad
          s_{nt} \mid s_{n,t-1} \sim \mathrm{Categorical}(\mathrm{softmax}(A_{s_{n,t-1}} + \epsilon_n e_2)), \quad
          x_{nt} \sim \mathrm{Gamma}(\alpha_{s_{nt}}, \beta_{s_{nt}})

Steps of tracked animals that rest or travel; the states are summed out. McClintock and Michelot, "momentuHMM", 2018; after
Pyro's example ``mixed_hmm``. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from gallery.zoo import Problem, seeded

NUM_ANIMALS, NUM_TIMES = 30, 8


def data():
    """Lengths of steps, ``[N, T]``."""
    with seeded():
        effect, state, x = torch.randn(NUM_ANIMALS), torch.zeros(NUM_ANIMALS), []
        for _ in range(NUM_TIMES):
            state = torch.bernoulli((effect + torch.where(state > 0, 1.5, -1.5)).sigmoid())
            x.append(dist.Gamma(torch.where(state > 0, 8.0, 2.0), 2.0).sample())
        return torch.stack(x, -1)


def model(x):
    transition = pyro.sample("transition", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    shape = pyro.sample("shape", dist.LogNormal(torch.tensor([0.5, 2.0]), 0.5).to_event(1))
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("animals", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, scale))
        state = torch.tensor(0)
        for t in pyro.markov(range(x.shape[1])):
            logits = transition[state] + effect
            probs = torch.stack([(-logits).sigmoid(), logits.sigmoid()], -1)
            state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Gamma(shape[state], rate[state]), obs=x[:, t])


def problem() -> Problem:
    return Problem(
        origin="example `mixed_hmm`",
        rows=f"{NUM_ANIMALS} animals",
        make_model=lambda: model,
        args=(data(),),
        pyro_guide="AutoNormal",
        make_pyro_guide=lambda model: AutoNormal(poutine.block(model, hide_fn=_is_state)),
        num_steps=300,
        lr=0.05,
        make_elbo=lambda: TraceEnum_ELBO(max_plate_nesting=1),
    )


def _is_state(site):
    return site["name"].startswith("state_")
