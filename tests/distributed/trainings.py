"""Trainings that several processes take together, and that one process takes over again."""

from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_avi as avi
from pyro_avi.seeds import Stream, seed_of_rank

# Two processes hold 12 and 11 rows, of which a batch has 4 and 4, and now and then 5 and 3.
SIZE, BATCH, STEPS, SEED = 23, 8, 10, 3
X = torch.randn(SIZE, 5, dtype=torch.double, generator=torch.Generator().manual_seed(0))
GUIDES = {
    "constant": avi.ConstantGuide,
    "amortized": partial(avi.AmortizedGuide, encoder=(6,)),
    "factorized": avi.FactorizedGuide,
    "factorized, host memory": partial(avi.FactorizedGuide, rows_on="cpu"),
}


class Model(pyro.nn.PyroModule):
    """A model with a learned and a Bayesian global."""

    def __init__(self, size=SIZE):
        super().__init__()
        self.size, self.decoder = size, nn.Linear(2, 5).double()

    def forward(self, x, index=None):
        shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", self.size, subsample=index):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z) + shift, 0.5).to_event(1), obs=x)


def build(kind, seed=0, size=SIZE):
    """A model, and a guide that has been set up with all rows."""
    torch.manual_seed(seed)
    model = Model(size)
    return model, GUIDES[kind](model).setup(X[:size])


def train(model, guide, *args, **options):
    defaults = {"num_steps": STEPS, "lr": 0.05, "clip_norm": 30.0, "seed": SEED, "compile": False, "progress": False}
    return avi.fit(model, guide, *args, **{**defaults, **options})


def without_noise(on=True):
    """A context in which every normal draw is its mean."""
    return patch("torch.distributions.normal._standard_normal", _zeros) if on else nullcontext()


def _zeros(shape, dtype, device):
    return torch.zeros(shape, dtype=dtype, device=device)


def outcome(model, guide, fit):
    """All numbers of a training: its losses, and the parameters by name."""
    parts = {"model": model, "guide": guide}
    values = {f"{part}.{name}": x for part, module in parts.items() for name, x in module.state_dict().items()}
    return {"losses": fit.losses, **{name: value.clone() for name, value in values.items()}}


class OfAllBatches:
    """The loss of the batches of all processes, each by the draws of its process.

    Args:
        count: the number of processes.
        mean: ``False`` for the sum over processes, a wrong scale.
    """

    def __init__(self, count=2, mean=True):
        self._count, self._mean, self._streams = count, mean, None

    def differentiable_loss(self, model, guide, *batches):
        if self._streams is None:
            # The first evaluation finds the parameters, and is no step.
            self._streams = ()
        elif not self._streams:
            self._streams = [Stream(seed_of_rank(SEED, rank)) for rank in range(self._count)]
        losses = []
        for batch, stream in zip(batches, self._streams or [nullcontext()] * self._count, strict=True):
            with stream:
                losses.append(len(batch[-1]) * Trace_ELBO().differentiable_loss(model, guide, *batch))
        return sum(losses) / (sum(len(batch[-1]) for batch in batches) if self._mean else len(batches[0][-1]))
