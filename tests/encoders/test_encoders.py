"""Encoders: shapes, what they compute, and what they refuse."""

import copy
import doctest
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_avi as avi
from pyro_avi import encoders
from pyro_avi.encoders import MLP, Conv
from tests.discovery import classes_in


def documented():
    """The encoders of the library, each a pair of encoder and rows that the example of its docstring makes, by name."""
    found = {}
    for name, encoder in classes_in(encoders, nn.Module).items():
        example = doctest.DocTestParser().get_doctest(encoder.__doc__, {}, name, None, None)
        doctest.DocTestRunner(verbose=False).run(example, clear_globs=False)
        if {"encoder", "x"} <= set(example.globs):
            found[name] = (example.globs["encoder"], example.globs["x"])
    return found


DOCUMENTED = documented()
OTHERS = {
    "MLP of one layer": (MLP(3, [4]), torch.rand(5, 3)),
    "MLP of scalars": (MLP(1, (4,)), torch.rand(5)),
    "Conv of odd sizes": (Conv(3, (9, 13), channels=(2, 2, 2), features=4), torch.rand(5, 3, 9, 13)),
    "Conv of the smallest image": (Conv(1, (4, 4), features=2), torch.rand(5, 1, 4, 4)),
}
ENCODERS = {**DOCUMENTED, **OTHERS}


def test_the_example_of_every_public_encoder_makes_one():
    assert set(encoders.__all__) <= set(DOCUMENTED)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_become_features(name, rows):
    encoder, example = ENCODERS[name]
    encoder, x = copy.deepcopy(encoder), torch.randn(rows, *example.shape[1:])

    h = encoder(x)

    assert h.shape == (rows, encoder(example).shape[1])
    # Each row by itself gives the same: rows do not look at one another.
    torch.testing.assert_close(torch.cat([encoder(row[None]) for row in x]), h)
    h.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert encoder.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", ENCODERS)
def test_an_amortized_guide_takes_it(name):
    encoder, x = ENCODERS[name]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z.sum(-1).reshape(-1, *[1] * (x.dim() - 1))
            pyro.sample("x", dist.Normal(loc, 1.0).expand(x.shape).to_event(x.dim() - 1), obs=x)

    guide = avi.AmortizedGuide(model, encoder=copy.deepcopy(encoder)).setup(x)
    with pyro.validation_enabled(False):
        fit = avi.fit(model, guide, x, num_steps=2, lr=1e-2, compile=False, progress=False)

    assert all(math.isfinite(loss) for loss in fit.losses)
    assert guide.variational_parameters(x).shape == (len(x), 4)


def test_the_formula_of_the_mlp():
    torch.manual_seed(0)
    encoder, x = MLP(4, (3, 2), activation=nn.Tanh), torch.randn(5, 2, 2)

    first, second = (layer for layer in encoder.layers if isinstance(layer, nn.Linear))
    h = torch.tanh(x.view(5, 4) @ first.weight.t() + first.bias)
    expected = torch.tanh(h @ second.weight.t() + second.bias)

    torch.testing.assert_close(encoder(x), expected)


def test_an_activation_can_be_chosen_for_images():
    layers = Conv(1, (8, 8), activation=nn.Tanh).layers
    assert sum(isinstance(layer, nn.Tanh) for layer in layers) == 3
    assert not any(isinstance(layer, nn.SiLU) for layer in layers)


REFUSED = [
    (lambda: MLP(0, (4,)), ValueError, "at least 1, got 0"),
    (lambda: MLP(4, (4, 0)), ValueError, "at least 1, got 0 in (4, 0)"),
    (lambda: MLP(4, (-1,)), ValueError, "at least 1, got -1"),
    (lambda: MLP(4, (True,)), ValueError, "at least 1, got True"),
    (lambda: MLP(4, (2.0,)), ValueError, "at least 1, got 2.0"),
    (lambda: MLP(4, ()), ValueError, "at least one width, got none"),
    (lambda: MLP(4, "64"), TypeError, "widths of an MLP, e.g. (64, 64), got '64'"),
    (lambda: MLP(4, 64), TypeError, "widths of an MLP, e.g. (64, 64), got 64"),
    (lambda: Conv(0, (8, 8)), ValueError, "got 0"),
    (lambda: Conv(1, (8, 0)), ValueError, "got 0"),
    (lambda: Conv(1, (8, 8), channels=(4, 0)), ValueError, "got 0"),
    (lambda: Conv(1, (8, 8), channels=()), ValueError, "at least one"),
    (lambda: Conv(1, (8, 8), features=-3), ValueError, "got -3"),
    (lambda: Conv(1, (8, 8), features=True), ValueError, "got True"),
    (lambda: Conv(1, (3, 28)), ValueError, "at least 4 pixels a side for 2 halvings, got (3, 28)"),
]


@pytest.mark.parametrize("call, error, message", REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error) as raised:
        call()

    assert message in str(raised.value)
