"""Logarithms of exponentials in graphs."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_avi.rewriting.logarithms import simplify_logarithms

LOG = torch.ops.aten.log.default
U = torch.linspace(-3, 3, 12, dtype=torch.double).view(3, 4)


def of_one(b):
    return torch.tensor([b], dtype=torch.double)


# By what is computed: a function of many numbers and of one, and how many logarithms are left, of one number or of many.
SIMPLER = {
    "exponential": (lambda u, b: u.exp().log(), 0),
    "of another shape": (lambda u, b: u.exp().view(4, 3).t().unsqueeze(0).expand(2, 3, 4).log(), 0),
    "square": (lambda u, b: u.exp().pow(2).log(), 0),
    "ratio": (lambda u, b: (u.exp() / b.abs()).log(), 1),
    "ratio to what is spread out": (lambda u, b: (u.exp() / b.abs().expand(3, 4)).log(), 1),
    "square of a ratio, of either sign": (lambda u, b: (u.exp().view(12) / b.expand(12)).pow(2).log(), 1),
}
AS_IT_IS = {
    "no exponential": lambda u, b: (u.abs() + b.abs()).log(),
    "third power": lambda u, b: u.exp().pow(3).log(),
    "ratio to many": lambda u, b: (u.exp() / u.abs()).log(),
    "ratio to one of more dimensions": lambda u, b: (u.exp() / b.abs().view(1, 1, 1)).log(),
    "ratio of another type": lambda u, b: (u.exp() / b.abs().float().expand(3, 4)).log(),
    "exponential of whole numbers": lambda u, b: u.long().exp().log(),
    "sum of exponentials": lambda u, b: (u.exp() + 1).log(),
}


def simplified(function, b):
    given = (U, of_one(b))
    traced = make_fx(function)(*given)
    expected = traced(*given)
    simplify_logarithms(traced)
    torch.testing.assert_close(traced(*given), expected, rtol=1e-14, atol=1e-14, equal_nan=True)
    return [node for node in traced.graph.nodes if node.target == LOG], traced


@pytest.mark.parametrize("b", [0.3, -2.0])
@pytest.mark.parametrize("name", SIMPLER)
def test_of_many_numbers_no_logarithm_is_left(name, b):
    function, left = SIMPLER[name]
    logarithms, _ = simplified(function, b)
    # Those that are left are new ones, of the one number.
    assert len(logarithms) == left and not any("val" in node.meta for node in logarithms)


@pytest.mark.parametrize("name", AS_IT_IS)
def test_other_logarithms_are_left(name):
    (logarithm,), _ = simplified(AS_IT_IS[name], -2.0)
    assert "val" in logarithm.meta


def test_a_ratio_to_a_negative_number_has_no_logarithm():
    traced = simplified(SIMPLER["ratio"][0], 1.0)[1], simplified(lambda u, b: (u.exp() / b).log(), -1.0)[1]
    assert traced[1](U, of_one(-1.0)).isnan().all() and traced[0](U, of_one(-1.0)).isfinite().all()


def test_an_exponential_that_is_rounded_to_infinity_has_its_logarithm():
    _, traced = simplified(SIMPLER["square"][0], 1.0)
    assert torch.equal(traced(U - 900, of_one(1.0)), 2 * (U - 900))
