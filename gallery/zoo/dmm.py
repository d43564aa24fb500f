r"""A deep Markov model of sequences of different lengths, with the recurrent guide that comes with it.

.. math:: z_{nt} \sim N(f(z_{n,t-1}), s^2(z_{n,t-1})), \qquad x_{nt} \sim \mathrm{Bernoulli}(\mathrm{emitter}(z_{nt}))

Krishnan, Shalit and Sontag, "Structured Inference Networks for Nonlinear State Space Models", 2017; after Pyro's example
``dmm``, whose guide runs a recurrent network backward over a sequence and draws :math:`z_t` given :math:`z_{t-1}`. Observations
behind the end of a sequence are masked; states there follow the model. Data are simulated.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_avi as avi
from gallery.zoo import Problem, seeded

NUM_SEQUENCES, NUM_TIMES, NUM_COLUMNS, NUM_LATENTS, WIDTH = 60, 6, 8, 2, 16


def data():
    """Sequences ``[N, T, D]`` of zeros and ones and the mask ``[N, T]`` of the times that they have."""
    with seeded():
        z, weight = torch.randn(NUM_SEQUENCES, NUM_LATENTS), 2.0 * torch.randn(NUM_LATENTS, NUM_COLUMNS)
        x = []
        for _ in range(NUM_TIMES):
            z = 0.8 * z + 0.6 * torch.randn(NUM_SEQUENCES, NUM_LATENTS)
            x.append(torch.bernoulli((z @ weight).sigmoid()))
        mask = torch.arange(NUM_TIMES) < torch.randint(3, NUM_TIMES + 1, (NUM_SEQUENCES, 1))
        return torch.stack(x, 1) * mask.unsqueeze(-1), mask


class DMM(nn.Module):
    """The model's transition and emitter, the guide's recurrent network and combiner."""

    def __init__(self):
        super().__init__()
        self.transition = nn.Sequential(nn.Linear(NUM_LATENTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * NUM_LATENTS))
        self.emitter = nn.Sequential(nn.Linear(NUM_LATENTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, NUM_COLUMNS))
        self.recurrent = nn.RNN(NUM_COLUMNS, WIDTH, batch_first=True)
        self.hidden = nn.Linear(NUM_LATENTS, WIDTH)
        self.combiner = nn.Linear(WIDTH, 2 * NUM_LATENTS)

    def model(self, x, mask):
        pyro.module("model", nn.ModuleList([self.transition, self.emitter]))
        z = x.new_zeros(len(x), NUM_LATENTS)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                loc, scale = self.transition(z).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(z + loc, nn.functional.softplus(scale)).to_event(1))
                emission = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t : t + 1]).to_event(1)
                pyro.sample(f"x_{t}", emission, obs=x[:, t])

    def guide(self, x, mask):
        pyro.module("guide", nn.ModuleList([self.recurrent, self.hidden, self.combiner]))
        # Zeros behind the end leave the network in a state of its own, whatever the length.
        backward, _ = self.recurrent(x.flip(1))
        backward, z = backward.flip(1), x.new_zeros(len(x), NUM_LATENTS)
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                loc, scale = self.combiner(0.5 * (self.hidden(z).tanh() + backward[:, t])).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, nn.functional.softplus(scale)).to_event(1))


def problem() -> Problem:
    return Problem(
        origin="example `dmm`",
        rows=f"{NUM_SEQUENCES} sequences",
        make_model=lambda: DMM().model,
        args=data(),
        pyro_guide="by hand",
        make_pyro_guide=lambda model: model.__self__.guide,
        num_steps=400,
        lr=0.01,
        # States depend on those before them, in the guide by hand too.
        options={"family": avi.MarkovNormal(order=2 * NUM_LATENTS - 1)},
    )
