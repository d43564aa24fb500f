"""Products in lower precision: their factors are rounded, and nothing else is."""

import pytest
import torch
from torch import nn

import pyro_avi as avi
from pyro_avi.optimization.precision import matmul_precision


def rounded(x):
    return x.bfloat16().float()


def test_a_layer_rounds_its_factors_forward_and_backward():
    x, layer = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 3)
    grad = torch.randn(6, 3)
    with matmul_precision("bfloat16"):
        out = layer(x)
        found = torch.autograd.grad(out, [x, layer.weight, layer.bias], grad)

    # A product of rounded factors is rounded once more; the bias is added in single precision.
    assert torch.equal(out, rounded(rounded(x) @ rounded(layer.weight).T) + layer.bias)
    expected = rounded(rounded(grad) @ rounded(layer.weight)), rounded(rounded(grad).T @ rounded(x)), grad.sum(0)
    for one, two in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    assert torch.equal(found[2], grad.sum(0))
    assert not torch.equal(out, layer(x))


def test_convolutions_and_batches_of_matrices():
    x, convolution = torch.randn(2, 3, 6, 6), nn.Conv2d(3, 4, 3)
    a, b, c = torch.randn(5, 2, 3), torch.randn(5, 3, 4), torch.randn(5, 2, 4)
    with matmul_precision("bfloat16"):
        found = [convolution(x), a @ b, torch.baddbmm(c, a, b, beta=2.0, alpha=0.5)]
    for one, two in zip(found, [convolution(x), a @ b, 2 * c + 0.5 * (a @ b)], strict=True):
        assert one.dtype == torch.float32
        assert 1e-4 < (one - two).norm() / two.norm() < 1e-2


def test_other_operations_and_double_precision_are_left_alone():
    x, w = torch.randn(5, 4), torch.randn(4, 4)
    with matmul_precision("bfloat16"):
        assert torch.equal(x.exp().sum() + x.log1p().nan_to_num().sum(), x.exp().sum() + x.log1p().nan_to_num().sum())
        double = x.double() @ w.double()
    assert torch.equal(double, x.double() @ w.double())


def test_tf32_is_given_back():
    before = torch.backends.cuda.matmul.allow_tf32
    with matmul_precision("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize(("precision", "seen"), [("tf32", {True}), ("float32", {False}), ("bfloat16", {False})])
def test_tf32_is_chosen_whenever_a_graph_runs(monkeypatch, precision, seen):
    """Kernels ask for it: at tracing, where graphs ask for bfloat16, it would be in vain."""
    asked = []

    def compile_graph(traced, inputs, **options):
        return lambda *args: (asked.append(torch.backends.cuda.matmul.allow_tf32), traced(*args))[1]

    monkeypatch.setattr("pyro_avi.optimization.compiled_step.compile_graph", compile_graph)
    model = avi.models.VAE(avi.models.DenseDecoder(2, (4,), (1, 2, 2)), size=3)
    guide = avi.AmortizedGuide(model, encoder=(3,))
    avi.fit(model, guide, torch.rand(3, 1, 2, 2), num_steps=2, precision=precision, compile=True, progress=False)
    # Compared once, then two steps.
    assert len(asked) == 3 and set(asked) == seen and not torch.backends.cuda.matmul.allow_tf32


def trained(precision, compile):
    torch.manual_seed(1)
    x = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 6, 6)), size=40)
    guide = avi.AmortizedGuide(model, encoder=(16,)).setup(x)
    fit = avi.fit(model, guide, x, num_steps=60, lr=0.01, precision=precision, compile=compile, progress=False)
    assert all(parameter.dtype == torch.float32 for part in (model, guide) for parameter in part.parameters())
    return fit.losses


def test_a_training_in_bfloat16_products_ends_where_it_would():
    full, low = trained("float32", False), trained("bfloat16", False)
    assert not torch.equal(full, low)
    # The draws are the same, so that what differs is rounding.
    torch.testing.assert_close(low, full, rtol=5e-3, atol=0.0)


@pytest.mark.slow
def test_it_is_the_same_compiled():
    torch.testing.assert_close(trained("bfloat16", True), trained("bfloat16", False), rtol=5e-3, atol=0.0)
