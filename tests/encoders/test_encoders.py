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
from pyro_avi.encoders import MLP, Attention, Conv, Noise, Polynomial, Recurrent, Set
from pyro_avi.encoders.sequence import SequenceEncoder
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
    "Polynomial of degree 0": (Polynomial(3, 0), torch.rand(5, 3)),
    "Set of numbers": (Set(1, (4,)), torch.rand(5, 7)),
    "Set of one": (Set(2, (4,)), torch.rand(5, 1, 2)),
    "Recurrent of three layers": (Recurrent(3, (4, 4, 2)), torch.rand(5, 3)),
    "Attention of one head": (Attention(3, 4, heads=1), torch.rand(5, 3)),
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
    by_itself = torch.cat([encoder(row[None]) for row in x])
    if isinstance(encoder, SequenceEncoder):
        # Its rows are those of a series.
        assert rows == 1 or not torch.allclose(by_itself, h)
    else:
        torch.testing.assert_close(by_itself, h)
    if list(encoder.parameters()):
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


def test_a_polynomial_is_all_products_in_any_order_once():
    x = torch.tensor([[2.0, 3.0]])

    assert Polynomial(2, 2)(x).tolist() == [[2, 3, 4, 6, 9]]
    assert Polynomial(1, 3)(x[:, :1]).tolist() == [[2, 4, 8]]
    # Of M elements and degree d there are as many as monomials but the constant.
    assert Polynomial(5, 3)(torch.rand(1, 5)).shape[1] == math.comb(5 + 3, 3) - 1
    assert torch.equal(Polynomial(2, 0)(x), torch.zeros(1, 1))


def test_noise_is_normal_and_only_while_training():
    """10,000 draws: standard errors of .005 of the mean and .0035 of the standard deviation."""
    torch.manual_seed(0)
    noise, x = Noise(0.5), torch.full((1000, 10), 3.0, dtype=torch.double)

    drawn = noise(x) - x

    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 0.5) < 0.015
    assert drawn.unique().numel() == drawn.numel() and drawn.dtype == x.dtype
    assert torch.equal(noise.eval()(x), x)
    assert repr(noise) == "Noise(0.5)"


def test_a_set_has_no_order_and_what_is_not_there_does_not_matter():
    torch.manual_seed(0)
    encoder, x = Set(2, (8, 4)), torch.randn(6, 5, 2)
    h = encoder(x)

    torch.testing.assert_close(encoder(x[:, torch.randperm(5)]), h)
    padded = torch.cat([x, torch.full((6, 3, 2), torch.nan)], 1)
    torch.testing.assert_close(encoder(padded), h)
    # The number of observations counts, also if all are alike.
    assert not torch.allclose(encoder(torch.cat([x, x], 1)), h)
    # A value alone may be missing, and is not one of zero.
    x[:, :, 1] = torch.nan
    assert encoder(x).isfinite().all() and not torch.allclose(encoder(x), encoder(x.nan_to_num()))
    assert encoder(torch.full((2, 5, 2), torch.nan)).isfinite().all()


SEQUENCES = {"Recurrent": lambda: Recurrent(2, (6, 4)), "Attention": lambda: Attention(2, 4, heads=2)}


@pytest.mark.parametrize("name", SEQUENCES)
def test_series_of_different_lengths_are_as_each_by_itself(name):
    torch.manual_seed(0)
    encoder, series = SEQUENCES[name](), [torch.randn(length, 2) for length in (7, 3, 1)]
    padded = torch.full((3, 7, 2), torch.nan)
    for row, one in zip(padded, series, strict=True):
        row[: len(one)] = one

    h = encoder(padded)

    assert h.isfinite().all()
    for got, one in zip(h, series, strict=True):
        torch.testing.assert_close(got[: len(one)], encoder(one))
    assert encoder(torch.full((2, 3, 2), torch.nan)).isfinite().all()


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_row_of_a_series_is_read_by_every_other(name):
    torch.manual_seed(0)
    encoder, x = SEQUENCES[name]().double(), torch.randn(5, 2, dtype=torch.float64)

    jacobian = torch.autograd.functional.jacobian(encoder, x)

    assert (jacobian.abs().amax((1, 3)) > 0).all()


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
    (lambda: Polynomial(0, 1), ValueError, "at least 1, got 0"),
    (lambda: Polynomial(2, -1), ValueError, "degree to be a whole number of at least 0, got -1"),
    (lambda: Polynomial(2, 1.0), ValueError, "degree to be a whole number of at least 0, got 1.0"),
    (lambda: Polynomial(784, 2), ValueError, "at most 10,000 products of one degree"),
    (lambda: Polynomial(2, 1)(torch.rand(4, 3)), ValueError, "rows with 2 elements, got 3"),
    (lambda: Noise(-0.1), ValueError, "scale to be a number of at least 0, got -0.1"),
    (lambda: Noise(math.nan), ValueError, "scale to be a number of at least 0, got nan"),
    (lambda: Set(0, (4,)), ValueError, "at least 1, got 0"),
    (lambda: Set(2, ()), ValueError, "at least one width, got none"),
    (lambda: Set(2, (4,))(torch.rand(4, 2)), ValueError, "[B, M, 2], got shape (4, 2)"),
    (lambda: Set(2, (4,))(torch.rand(4, 0, 2)), ValueError, "at least one observation a row, got shape (4, 0, 2)"),
    (lambda: Recurrent(2, ()), ValueError, "at least one width, got none"),
    (lambda: Recurrent(2, (4,))(torch.rand(4, 3)), ValueError, "[..., N, 2], got shape (4, 3)"),
    (lambda: Attention(2, 6, heads=4), ValueError, "heads that divide the 6 features, got 4"),
    (lambda: Attention(2, 6, heads=0), ValueError, "at least 1, got 0"),
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
