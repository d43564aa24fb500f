"""Which library multiplies matrices in a graph for a CPU.

torch multiplies single-precision matrices by Intel's MKL, which takes a slower path on processors that are not Intel's. There
oneDNN, which torch brings along, is faster for large products. The choice follows from the processor and the shapes alone,
never from a measurement, so that the same graph gives the same numbers on every machine of a kind.
"""

import logging
import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["multiply_by_fastest"]

_LOG = logging.getLogger("pyro_avi")


class _Rule(NamedTuple):
    """The products that oneDNN is to take: of at least so many operations, and whether also of a transposed left matrix."""

    least_flops: int
    transposed: bool


# By vendor and family of the processor, as measured: on AMD's family 25 (AVX-512 in two halves) it is faster by 10 to 50 % for
# 1,000 rows and more, slower for gradients of weights (transposed); on family 26 faster by a factor of 2, whatever the layout.
_RULES: dict[tuple[str, int] | None, _Rule] = {
    ("AuthenticAMD", 25): _Rule(2**28, transposed=False),
    ("AuthenticAMD", 26): _Rule(2**24, transposed=True),
}

_library = torch.library.Library("pyro_avi", "DEF")
# An operator of our own, as inductor takes torch's for weights that never change alone.
_library.define("onednn_mm(Tensor one, Tensor two) -> Tensor")


def _onednn_mm(one: Tensor, two: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(one, two.t(), None, "none", [], "")


_library.impl("onednn_mm", _onednn_mm, "CPU")
torch.library.register_fake(
    "pyro_avi::onednn_mm", lambda one, two: one.new_empty(one.shape[0], two.shape[1]), lib=_library
)


def multiply_by_fastest(traced: GraphModule) -> None:
    """Let oneDNN take the products of a graph that it is faster at on this processor; only rounding changes.

    How many those are is logged at level INFO, with the logger ``pyro_avi``, if there are any.

    Args:
        traced: the graph, for a CPU, changed in place.
    """
    rule = _RULES.get(_processor())
    if rule is None or not torch.backends.mkldnn.is_available():
        return
    products = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    moved = [node for node in products if _is_faster(node, rule)]
    for node in moved:
        node.target = torch.ops.pyro_avi.onednn_mm.default
    traced.recompile()
    if moved:
        what = f"Products by oneDNN: {len(moved)} of {len(products)}"
        _LOG.info("%s.", what, extra={"what": what, "fallback": None})


def _is_faster(product: Node, rule: _Rule) -> bool:
    one, two = (node.meta.get("val") if isinstance(node, Node) else None for node in product.args)
    if one is None or two is None or one.dtype != torch.float32:
        return False
    flops = 2 * one.shape[0] * one.shape[1] * two.shape[1]
    return flops >= rule.least_flops and (rule.transposed or one.is_contiguous())


@cache
def _processor() -> tuple[str, int] | None:
    """Vendor and family, where the system tells."""
    told = Path("/proc/cpuinfo")
    # Windows tells it by the platform module: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD".
    return _read_processor(told.read_text() if told.is_file() else platform.processor())


def _read_processor(text: str) -> tuple[str, int] | None:
    vendor = re.search(r"GenuineIntel|AuthenticAMD", text)
    family = re.search(r"family\s*:?\s*(\d+)", text, re.IGNORECASE)
    return (vendor[0], int(family[1])) if vendor and family else None
