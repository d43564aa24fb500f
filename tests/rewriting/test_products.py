"""Which library multiplies matrices in a graph for a CPU."""

import logging
import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_avi.compilation.inductor import compile_graph, has_compiler
from pyro_avi.rewriting import products

aten, onednn = torch.ops.aten, torch.ops.pyro_avi.onednn_mm

ZEN4, ZEN5 = ("AuthenticAMD", 25), ("AuthenticAMD", 26)


def traced_products(rows=1024):
    """A graph of the three products of a layer: its output, and the gradients of input and weights, and one small product."""

    def layer(x, weight, grad):
        return torch.mm(x, weight.t()), torch.mm(grad, weight), torch.mm(grad.t(), x), torch.mm(x[:2], weight.t())

    torch.manual_seed(0)
    given = [torch.randn(shape) for shape in ((rows, 256), (784, 256), (rows, 784))]
    return make_fx(layer)(*given), given


@pytest.mark.parametrize(
    "processor, rows, moved",
    [(ZEN4, 1024, [0, 1]), (ZEN4, 256, []), (ZEN5, 1024, [0, 1, 2]), (ZEN5, 256, [0, 1, 2]), (ZEN5, 16, [])]
    + [(other, 1024, []) for other in (("GenuineIntel", 6), ("AuthenticAMD", 23), None)],
)
def test_products_that_onednn_is_faster_at_are_its_own(monkeypatch, caplog, processor, rows, moved):
    monkeypatch.setattr(products, "_processor", lambda: processor)
    traced, given = traced_products(rows)
    expected = [x.double() for x in traced(*given)]

    with caplog.at_level(logging.INFO, logger="pyro_avi"):
        products.multiply_by_fastest(traced)

    order = [node.target for node in traced.graph.nodes if node.target in (aten.mm.default, onednn.default)]
    assert [at for at, target in enumerate(order) if target is onednn.default] == moved
    assert [entry.what for entry in caplog.records] == ([f"Products by oneDNN: {len(moved)} of 4"] if moved else [])
    for one, two in zip(traced(*given), expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("with_draws", [False, True])
def test_a_compiled_graph_multiplies_by_onednn_to_the_same_bits_every_time(monkeypatch, with_draws):
    monkeypatch.setattr(products, "_processor", lambda: ZEN5)
    traced, given = traced_products(256)
    expected = [x.double() for x in traced(*given)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own deprecations
        compiled = compile_graph(traced, given, with_draws=with_draws)
    first, second = compiled(*given), compiled(*given)
    for one, two, value in zip(first, second, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.double(), value, rtol=1e-4, atol=1e-3)


def test_products_in_double_precision_stay(monkeypatch):
    monkeypatch.setattr(products, "_processor", lambda: ZEN5)
    x = torch.randn(512, 512, dtype=torch.double)
    traced = make_fx(torch.mm)(x, x)
    products.multiply_by_fastest(traced)
    assert len(traced.graph.find_nodes(op="call_function", target=aten.mm.default)) == 1


@pytest.mark.parametrize(
    "text, processor",
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", ZEN4),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", ("GenuineIntel", 6)),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", ZEN5),
        ("CPU implementer\t: 0x41\nCPU architecture: 8\n", None),
        ("", None),
    ],
)
def test_the_processor_is_read_as_systems_tell_it(text, processor):
    assert products._read_processor(text) == processor
