"""Steps as graphs: when they can be had, what they depend on, and what inductor makes of them."""

import linecache
import logging
import os
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from pyro_avi.sticking_the_landing import StickingTheLandingELBO

__all__ = [
    "NO_COMPILER",
    "READS",
    "CannotCompile",
    "Traced",
    "can_be_compiled",
    "compile_graph",
    "count_flops",
    "has_compiler",
    "in_modules",
    "in_place_of",
    "log_graph",
    "pays",
    "reason_of",
    "slots_of",
    "take_apart",
]

# Where each of these reads its loss into Python, which a graph cannot follow.
READS = {
    Trace_ELBO: "pyro.infer.trace_elbo.torch_item",
    StickingTheLandingELBO: "pyro.infer.trace_elbo.torch_item",
    TraceMeanField_ELBO: "pyro.infer.trace_mean_field_elbo.torch_item",
}

#: A reason to evaluate eagerly what is on a CPU.
NO_COMPILER = "there is no C++ compiler"

_LOG = logging.getLogger("pyro_avi")

# The share of the arithmetic that compiling saves, in seconds. Roughly those of one core.
_SAVED_PER_FLOP = 1e-11


class CannotCompile(Exception):
    """Why a step is taken eagerly."""


@dataclass(frozen=True)
class Traced:
    """A step as a graph of tensor operations.

    Attributes:
        graph: takes ``own``, the tensors of a call, and ``draws()``.
        own: what it reads and moves: parameters, moments and visits, learning rates, and what model and guide hold.
        draws: draws from torch's random state what the step draws.
        drawn: whether the graph draws nothing itself.
        names, outputs: of the tables, and of what the graph returns, where it moves nothing.
    """

    graph: GraphModule
    own: list[Tensor]
    draws: Callable[[], list[Tensor]]
    drawn: bool
    names: list[str]
    outputs: Any


def can_be_compiled(
    elbo: ELBO, parameters: Sequence[Tensor], owners: Sequence[Callable], call: tuple, kwargs: Mapping[str, Any]
) -> bool:
    """Whether compiling may be tried without being asked for.

    Args:
        elbo: the loss.
        parameters: what is trained.
        owners: model and guide.
        call, kwargs: the arguments of the first step.
    """
    try:
        take_apart(call, kwargs)
    except CannotCompile:
        return False
    return in_modules(parameters, owners) and type(elbo) in READS


def count_flops(function: Callable, *args, **kwargs) -> int:
    """The operations of the matrix products and convolutions in one call of a function."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def pays(flops: int, *, calls: int, overhead: float, cost: float) -> bool:
    """Whether so many calls save more time than compiling takes.

    Counted and not timed, so that the numbers are decided by the arguments alone.

    Args:
        flops: those of one call, see :func:`count_flops`.
        calls: how often it is to be called.
        overhead: what a call takes beside its arithmetic, and compiled does not: seconds, roughly those of one core.
        cost: the seconds of compiling.
    """
    return calls * (overhead + _SAVED_PER_FLOP * flops) > cost


def in_modules(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> bool:
    """Whether every parameter belongs to a module of the owners, model and guide."""
    try:
        slots_of(parameters, owners)
    except CannotCompile:
        return False
    return True


# What torch says where a program reads a number out of a tensor, in its versions and in graphs of either kind.
_READ_OUT = ("data-dependent", "local_scalar_dense", "data dependent", "value out of a tracing tensor")


def reason_of(error: BaseException) -> str:
    """Why something could not be compiled, in a line, and where: what torch appends is pages long."""
    reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2]).removesuffix(".")
    if isinstance(error, CannotCompile):
        return reason
    if any(words in str(error).lower() for words in _READ_OUT):
        reason = "a number is read out of a tensor there, as by if, float() or .item(), which a graph cannot follow"
    place = _place_of(error)
    return reason if place is None else f"{place}: {reason}"


def _place_of(error: BaseException) -> str | None:
    """The line of the caller's own program that an error came from: the innermost outside of libraries and this package."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in _libraries()):
            text = linecache.getline(str(path), line).strip()
            found = f"{path}:{line}, `{text}`"
    return found


@cache
def _libraries() -> list[Path]:
    installed = [Path(folder) for folder in sysconfig.get_paths().values()]
    return [Path(__file__).parent, *(Path(module.__file__).parent for module in (torch, pyro)), *installed]


def log_graph(what: str, fallback: str | None = None) -> None:
    """Tell the logger ``pyro_avi``, at level INFO, that something is one graph, or that it is none though it was to be.

    Both round sums differently, so it is worth knowing of a number which of them it is from. What the arguments decide,
    as whether compiling pays, is not told.

    Args:
        what: "The training step" or the like, also the attribute ``what`` of the log's record.
        fallback: why it is evaluated eagerly all the same, also an attribute of the record.
    """
    how = "is one compiled graph" if fallback is None else f"is evaluated eagerly, not compiled: {fallback}"
    _LOG.info("%s %s.", what, how, extra={"what": what, "fallback": fallback})


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which graphs for a CPU need."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl" if sys.platform == "win32" else ""]
    return any(name and shutil.which(name) for name in names)


def take_apart(call: tuple, kwargs: Mapping[str, Any]) -> tuple[list, Any, tuple]:
    """The leaves of the arguments, their tree, and what a graph depends on of them.

    Raises:
        CannotCompile: if an argument may change without becoming another, as an array or a namespace.
    """
    # torch's walk through nests takes as long as a small graph.
    plain = not kwargs and all(isinstance(x, Tensor) for x in call)
    leaves, tree = (list(call), len(call)) if plain else tree_flatten((call, dict(kwargs)))
    known = (
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else _checked_constant(x) for x in leaves
    )
    return leaves, tree, (tree, *known)


def _checked_constant(leaf: Any) -> Any:
    """An argument that is no tensor, if it is what it is for ever: its value becomes part of the graph."""
    try:
        hash(leaf)
    except TypeError:
        changes = True
    else:
        # Equal only to itself: it may have other attributes tomorrow. Functions and modules are what is called.
        changes = type(leaf).__eq__ is object.__eq__ and not callable(leaf) and not isinstance(leaf, _CONSTANTS)
    if changes:
        raise CannotCompile(
            f"an argument is a {type(leaf).__name__}, whose content may change from step to step; pass tensors and numbers"
        )
    return leaf


_CONSTANTS = (Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(...))


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


def slots_of(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> list[tuple[nn.Module, str]]:
    """The module and name of each parameter."""
    # A method's parameters are those of the object it belongs to.
    roots = [getattr(owner, "__self__", owner) for owner in owners]
    modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
    known = {id(p): (module, name) for module in modules for name, p in module.named_parameters(recurse=False)}
    if not all(id(parameter) in known for parameter in parameters):
        raise CannotCompile("a parameter belongs to no module of model or guide")
    return [known[id(parameter)] for parameter in parameters]


@contextmanager
def in_place_of(slots: Sequence[tuple[nn.Module, str]], values: Sequence[Tensor]) -> Iterator[None]:
    """A context in which modules have these values for parameters."""
    own = [module._parameters[name] for module, name in slots]
    for (module, name), value in zip(slots, values, strict=True):
        module._parameters[name] = value
    try:
        yield
    finally:
        for (module, name), parameter in zip(slots, own, strict=True):
            module._parameters[name] = parameter
