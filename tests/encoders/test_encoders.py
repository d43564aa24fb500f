"""Encoders: shapes, what they compute, and what they refuse."""

import pytest
import torch
from torch import nn

from pyro_avi.encoders import MLP, Conv

ENCODERS = {
    "MLP": (lambda: MLP(12, (8, 5)), (3, 2, 2), 5),
    "MLP of one layer": (lambda: MLP(3, [4]), (3,), 4),
    "MLP of scalars": (lambda: MLP(1, (4,)), (), 4),
    "Conv": (lambda: Conv(1, (28, 28), channels=(2, 3), features=7), (1, 28, 28), 7),
    "Conv of odd sizes": (lambda: Conv(3, (9, 13), channels=(2, 2, 2), features=4), (3, 9, 13), 4),
    "Conv of the smallest image": (lambda: Conv(1, (4, 4), features=2), (1, 4, 4), 2),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_become_features(name, rows):
    make, shape, features = ENCODERS[name]
    torch.manual_seed(0)
    encoder, x = make(), torch.randn(rows, *shape)

    h = encoder(x)

    assert h.shape == (rows, features)
    # Each row by itself gives the same: rows do not look at one another.
    torch.testing.assert_close(torch.cat([encoder(row[None]) for row in x]), h)
    h.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert encoder.double()(x.double()).dtype == torch.float64


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
