"""Ways of training that need options alone, as docs/recipes.md has them."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_avi as avi
from tests.marks import needs_compiler

X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
STEPS = 6


def build(encoder=(5,)):
    torch.manual_seed(0)
    model = avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (5,), (1, 4, 4)), size=6).double()
    return model, avi.AmortizedGuide(model, encoder=encoder).setup(X)


def train(pair, **options):
    options = {"num_steps": STEPS, "lr": 0.01, "compile": False, "progress": False, **options}
    return avi.fit(*pair, X, **options)


def parts(model, guide):
    """The parameters of the inference function, and all others, each as one vector."""
    local = {id(parameter) for parameter in guide.local_parameters()}
    both = [*model.parameters(), *guide.parameters()]
    groups = [[p for p in both if (id(p) in local) is is_local] for is_local in (True, False)]
    return [torch.cat([p.detach().flatten() for p in group]) for group in groups]


def test_encoder_only_steps_move_nothing_else():
    pair = build()
    states = [parts(*pair)]

    train(
        pair,
        lr={"local": 0.01, "global": lambda step: 0.0 if step % 3 else 0.01},
        callbacks=[lambda fit: states.append(parts(*pair))],
    )

    moves = [
        [not torch.equal(a, b) for a, b in zip(*two, strict=True)] for two in zip(states, states[1:], strict=False)
    ]
    assert moves == [[True, step % 3 == 0] for step in range(STEPS)]


def by_part(groups, lr):
    local, other = groups
    return torch.optim.AdamW([{**local, "weight_decay": 0.5}, {**other, "weight_decay": 0.0}], lr=lr)


@pytest.mark.parametrize(
    "optimizer, decays", [(partial(torch.optim.AdamW, weight_decay=0.5), (0.5, 0.5)), (by_part, (0.5, 0.0))]
)
def test_weight_decay_shortens_the_parameters_of_a_part(optimizer, decays):
    """The first step of AdamW is that of Adam less lr times decay times the parameters."""
    lr = {"local": 0.01, "global": 0.02}
    start = parts(*build())
    without, with_decay = build(), build()

    train(without, num_steps=1, lr=lr, optimizer=torch.optim.Adam)
    train(with_decay, num_steps=1, lr=lr, optimizer=optimizer)

    for before, plain, decayed, rate, decay in zip(
        start, parts(*without), parts(*with_decay), lr.values(), decays, strict=True
    ):
        torch.testing.assert_close(plain - decayed, rate * decay * before, rtol=1e-9, atol=1e-12)
        assert not torch.equal(plain, before) and before.any()


LAYERS = {"normal": lambda: avi.encoders.Noise(0.5), "dropout": lambda: nn.Dropout(0.3)}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_encoder_reads_noise_and_the_model_is_given_the_rows(layer):
    encoder = avi.encoders.MLP(16, (5,)).double()
    pair, read = build(nn.Sequential(LAYERS[layer](), encoder)), []
    pair[1].encoder[1].register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))

    train(pair, num_steps=2)
    first, second = read[-2:]
    assert (first != X).any() and (first != second).any()
    assert torch.equal(poutine.trace(pair[0]).get_trace(X).nodes["x"]["value"], X)

    read.clear()
    avi.log_weights(*pair, X, num_samples=1, progress=False)
    pair[1].eval().posterior(X)
    assert read and all(torch.equal(each, X) for each in read)


@needs_compiler
@pytest.mark.slow
def test_a_graph_draws_noise_at_every_step():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def losses(compile, scale=0.5):
        torch.manual_seed(0)
        encoder = nn.Sequential(avi.encoders.Noise(scale), avi.encoders.MLP(1, (5,))).double()
        guide, x = avi.AmortizedGuide(model, encoder=encoder), X[:, 0, 0, 0]
        return avi.fit(model, guide, x, num_steps=STEPS, lr=0.05, compile=compile, progress=False).losses

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-7, atol=1e-9)
    # The twin: other noise would show.
    assert (losses(False) - losses(False, scale=0.4)).abs().max() > 1e-4
