"""Logarithms of exponentials taken out of a graph: scales are exponentials, and densities take their logarithms.

The divergence of a normal from another holds :math:`\\log (e^u / b)^2`, which is :math:`2 (u - \\log |b|)`: with a scale
:math:`b` for all latents, a difference for each of them instead of a logarithm.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["simplify_logarithms"]

aten = torch.ops.aten

# They change shapes alone, so that it is the same to do so before or after a logarithm.
_OF_SHAPES = {
    aten.view.default,
    aten.expand.default,
    aten.detach.default,
    aten.t.default,
    aten.permute.default,
    aten.unsqueeze.default,
}


def simplify_logarithms(traced: GraphModule) -> None:
    """Replace logarithms of exponentials, of their squares and of their ratios to one number; only rounding changes.

    Where an exponential is rounded to zero or infinity its logarithm is finite now.

    Args:
        traced: the graph, changed in place.
    """
    for node in traced.graph.find_nodes(op="call_function", target=aten.log.default):
        with traced.graph.inserting_before(node):
            simpler = _log_of(node.args[0], squared=False)
        if simpler is not None:
            node.replace_all_uses_with(simpler)
            traced.graph.erase_node(node)
    traced.recompile()


def _log_of(node: object, *, squared: bool) -> Node | None:
    """The logarithm of what a node computes, without taking one of many numbers; ``None`` where it is not known.

    Args:
        node: what stands in a graph.
        squared: whether it is the logarithm of its absolute value.
    """
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    graph = node.graph
    if node.target == aten.exp.default:
        exponent = node.args[0]
        # Of a whole number the exponential has another type.
        return exponent if isinstance(exponent, Node) and _type(exponent) == _type(node) else None
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        half = _log_of(node.args[0], squared=True)
        return None if half is None else graph.call_function(aten.mul.Tensor, (half, 2))
    if node.target in _OF_SHAPES:
        before = _log_of(node.args[0], squared=squared)
        return None if before is None else graph.call_function(node.target, (before, *node.args[1:]), dict(node.kwargs))
    if node.target == aten.div.Tensor and not node.kwargs:
        by = _one_number(node)
        over = None if by is None else _log_of(node.args[0], squared=squared)
        if over is not None:
            positive = graph.call_function(aten.abs.default, (by,)) if squared else by
            return graph.call_function(aten.sub.Tensor, (over, graph.call_function(aten.log.default, (positive,))))
    return None


def _one_number(division: Node) -> Node | None:
    """The number that all others are divided by, if it is one of their type."""
    over, by = division.args
    while isinstance(by, Node) and by.target == aten.expand.default:
        by = by.args[0]
    if not isinstance(by, Node) or not isinstance(over, Node) or _type(by) is None or _type(by) != _type(over):
        return None
    one, many = by.meta["val"], over.meta["val"]
    # The subtraction spreads it over the others again, where it has no more dimensions than they have.
    return by if one.numel() == 1 and one.dim() <= many.dim() else None


def _type(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None
