"""What inductor makes of a graph."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["NO_COMPILER", "compile_graph", "has_compiler"]

#: A reason to evaluate eagerly what is on a CPU.
NO_COMPILER = "there is no C++ compiler"


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which graphs for a CPU need."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl" if sys.platform == "win32" else ""]
    return any(name and shutil.which(name) for name in names)


def compile_graph(traced: GraphModule, inputs: Sequence[Tensor], *, with_draws: bool) -> Callable:
    """What inductor makes of a graph.

    Args:
        traced: the graph.
        inputs: examples, to whose shapes and strides it is bound without a check: the caller's signature is that.
        with_draws: whether the graph draws numbers itself.
    """
    # They bring in sympy, and filters of warnings with it: not for everyone who imports the library.
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    on_cpu = all(x.device.type == "cpu" for x in inputs)
    _simplify(traced, on_cpu)
    for node in traced.graph.nodes:
        # Of the mode that it was traced in, which another part of inductor refuses.
        node.meta.pop("val", None)
    # The eager generator: inductor's own is slower on CPUs, and the same seed is to give the same draws.
    options = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    if not with_draws and on_cpu:
        # The calls between the kernels in C++ too, which halves what a small step takes.
        options["cpp_wrapper"] = True
    # Not by torch.compile, whose checks of every input at every call take longer than a small step.
    # Inductor keeps what it has compiled on disk, if it knows where symbolic shapes would come from.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    with torch.no_grad(), tracing(context):
        return torch._inductor.compile(traced, list(inputs), options=options)


def _simplify(traced: GraphModule, on_cpu: bool) -> None:
    """Write what inductor takes as it is given in the way that takes less: rounding alone changes."""
    aten, graph = torch.ops.aten, traced.graph
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        over, by = node.args
        # One division instead of one for every element.
        while isinstance(by, Node) and by.target == aten.expand.default:
            by = by.args[0]
        if isinstance(by, Node) and _is_one_number_of_many(by.meta.get("val"), node.meta.get("val")):
            with graph.inserting_before(node):
                inverse = graph.call_function(aten.reciprocal.default, (by,))
            node.target, node.args = aten.mul.Tensor, (over, inverse)
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        # The library that multiplies begins by copying the bias to every row; what reads the product can add it as well.
        bias, one, two = node.args
        if on_cpu and not node.kwargs:
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (one, two))
                # Of an addition inductor would make the same again.
                negative = graph.call_function(aten.neg.default, (bias,))
            node.target, node.args = aten.sub.Tensor, (product, negative)
    traced.recompile()


def _is_one_number_of_many(by: Tensor | None, result: Tensor | None) -> bool:
    """Whether a quotient of many numbers has a single divisor, of its own type: the inverse of an integer is a single."""
    if by is None or result is None:
        return False
    return by.numel() == 1 < result.numel() and by.dtype == result.dtype
