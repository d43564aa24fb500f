"""Graphs compiled by inductor."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from pyro_avi.compilation.checksums import checked_loads
from pyro_avi.compilation.compile_cache import check_libraries, remove_damaged, warn_of_removed
from pyro_avi.compilation.kept_graphs import keep_graph, key_of, load_kept
from pyro_avi.compilation.library_graph import LibraryGraph, libraries_seen
from pyro_avi.rewriting.logarithms import simplify_logarithms
from pyro_avi.rewriting.products import multiply_by_fastest
from pyro_avi.toolchain.building import build_options, building
from pyro_avi.toolchain.vector_units import asked_in_full, found_quickly, may_be_others

__all__ = ["NO_COMPILER", "compile_graph", "has_compiler"]

#: The reason to evaluate eagerly on a CPU without a compiler.
NO_COMPILER = "there is no C++ compiler"


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which graphs for a CPU need."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl" if sys.platform == "win32" else ""]
    return any(name and shutil.which(name) for name in names)


def compile_graph(traced: GraphModule, inputs: Sequence[Tensor], *, with_draws: bool) -> Callable:
    """Compile a graph by inductor.

    Damaged files in inductor's cache, of which an error or a checksum tells or which are seen before they are loaded, are
    removed, and the graph is compiled again, with a warning.

    Args:
        traced: the graph, which is rewritten.
        inputs: examples. The result takes tensors of their shapes and strides, and does not check them: callers must.
        with_draws: whether the graph draws random numbers.
    """
    on_cpu = all(x.device.type == "cpu" for x in inputs)
    _simplify(traced, on_cpu)
    if on_cpu:
        multiply_by_fastest(traced)
    for node in traced.graph.nodes:
        # Fake tensors of the mode that it was traced in, which inductor does not accept in its own.
        node.meta.pop("val", None)
    # Draws by torch's generator: inductor's own is slower on CPUs, and a seed must give the draws of an eager run.
    options = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    key, counts = None, (len(inputs), len(cast("Sequence", traced.graph.output_node().args[0])))
    if not with_draws and on_cpu:
        # Call the kernels from C++ instead of Python, which halves the time of a small step.
        options["cpp_wrapper"] = True
        key = key_of(traced, inputs, options)
    kept, removed = load_kept(key, counts)
    if kept is not None:
        return kept
    with _garbage_left():
        compiled, libraries = _compile_mending(traced, inputs, options, removed)
    # A library that is all there is of the graph, which was not divided nor given inputs and outputs of its own.
    if key is None or [library.counts for library in libraries] != [counts]:
        return compiled
    keep_graph(key, libraries[0])
    return libraries[0]


@contextmanager
def _garbage_left() -> Iterator[None]:
    """A context without garbage collection: it is a tenth of what torch's compiler takes, and finds next to nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _compile_mending(
    traced: GraphModule, inputs: Sequence[Tensor], options: dict[str, bool], removed: list[Path]
) -> tuple[Callable, list[LibraryGraph]]:
    """Compile by inductor, again where files of its cache are damaged; return the graph and the libraries it consists of.

    Args:
        traced, inputs, options: what is compiled, and how.
        removed: damaged files that were removed before.
    """
    if options.get("cpp_wrapper"):
        options = options | build_options()
    removed = removed + check_libraries()
    # A graph is built with two headers, and either may be damaged. What fails still has another reason.
    for attempts_left in (2, 1, 0):
        try:
            with libraries_seen() as seen:
                compiled = _compile(traced, inputs, options)
            break
        # Of any class: compilers, loaders and unpicklers each fail with their own.
        except Exception as error:
            damaged = remove_damaged(error)
            if not attempts_left or not (damaged or (may_be_others(error) and asked_in_full())):
                raise
            removed += damaged
    if removed:
        warn_of_removed(removed)
    return compiled, seen


def _compile(traced: GraphModule, inputs: Sequence[Tensor], options: dict[str, bool]) -> Callable:
    # Not at the top: they import sympy, which takes time and changes the filters of warnings.
    from torch._functorch import config
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Not by torch.compile, whose guards on every input at every call take longer than a small step.
    # With a ShapeEnv inductor can use its cache on disk.
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    # AOTAutograd's cache does not know which inputs are the same tensor, and the libraries of graphs are kept instead of it.
    uncached = config.patch(enable_autograd_cache=False) if options.get("cpp_wrapper") else nullcontext()
    with torch.no_grad(), tracing(context), checked_loads(), found_quickly(), building(), uncached:
        return torch._inductor.compile(traced, list(inputs), options=options)


def _simplify(traced: GraphModule, on_cpu: bool) -> None:
    """Rewrite operations that inductor would compile as they are into faster ones; only rounding changes."""
    simplify_logarithms(traced)
    aten, graph = torch.ops.aten, traced.graph
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        over, by = node.args
        # Divide once and multiply, instead of a division for every element.
        while isinstance(by, Node) and by.target == aten.expand.default:
            by = by.args[0]
        if isinstance(by, Node) and _is_one_number_of_many(by.meta.get("val"), node.meta.get("val")):
            with graph.inserting_before(node):
                inverse = graph.call_function(aten.reciprocal.default, (by,))
            node.target, node.args = aten.mul.Tensor, (over, inverse)
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        # The matrix library would first copy the bias to every row; the kernel that reads the product can add it instead.
        bias, one, two = node.args
        if on_cpu and not node.kwargs:
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (one, two))
                # As a subtraction: inductor would turn an addition back into addmm.
                negative = graph.call_function(aten.neg.default, (bias,))
            node.target, node.args = aten.sub.Tensor, (product, negative)
    traced.recompile()


def _is_one_number_of_many(by: Tensor | None, result: Tensor | None) -> bool:
    """Whether many numbers are divided by one, of the same type: the inverse of an integer would be single precision."""
    if by is None or result is None:
        return False
    return by.numel() == 1 < result.numel() and by.dtype == result.dtype
