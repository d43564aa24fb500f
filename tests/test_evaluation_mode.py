"""Models whose modules ``torch.compile`` has compiled: they are measured as they were written."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_avi as avi
from pyro_avi.evaluation_mode import evaluation_mode

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """A model with a network, which may be compiled."""

    def __init__(self, compiles):
        super().__init__()
        self.calls = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        self.network = torch.compile(network, backend=self.backend) if compiles else network

    def backend(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        run = aot_eager(graph, inputs)

        def counted(*args):
            self.calls += 1
            return run(*args)

        return counted

    def forward(self, x, index=None):
        pyro.module("decoder", self)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(self.network(z), 0.5).to_event(1), obs=x)


def answers(model):
    guide = avi.AmortizedGuide(model, (4,)).setup(X)
    refined = avi.refine(model, guide, X, num_steps=2)
    verdict = avi.amortizability(model, X)
    weights = avi.log_weights(model, refined, X, num_samples=5, seed=0)
    return [verdict.possible, verdict.check(model, X), weights.local.tolist()]


@pytest.mark.slow
def test_numbers_are_those_of_the_modules_as_they_were_written():
    """Their second derivatives too, which compiled modules do not have, and without a warning."""
    model = Decoder(True)
    torch.manual_seed(0)
    found = answers(model)
    assert model.calls == 0
    torch.manual_seed(0)
    assert found == answers(Decoder(False))

    # The user's own calls are compiled.
    model.network(torch.randn(4, 2))
    assert model.calls == 1
    with evaluation_mode():
        model.network(torch.randn(4, 2))
    assert model.calls == 1
