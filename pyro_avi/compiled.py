"""A training step as one compiled graph: loss, gradient and Adam.

The loss of a reparameterized Pyro model and guide is a pure function of the parameters, the arguments and the draws. It is
traced together with its gradient and with what moves the parameters, so that handlers and validation run once, at tracing,
and inductor joins the elementwise operations of all.
"""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.adam import Adam
from pyro_avi.gradient import Gradient, Slope, clipped
from pyro_avi.lifting import lift_draws, lift_tensors
from pyro_avi.seeds import seeded
from pyro_avi.sticking_the_landing import StickingTheLandingELBO

__all__ = [
    "CannotCompile",
    "CompiledStep",
    "Traced",
    "Update",
    "can_be_compiled",
    "compile_graph",
    "in_modules",
    "reason_of",
    "take_apart",
]

# Where each of these reads its loss into Python, which a graph cannot follow.
_READS = {
    Trace_ELBO: "pyro.infer.trace_elbo.torch_item",
    StickingTheLandingELBO: "pyro.infer.trace_elbo.torch_item",
    TraceMeanField_ELBO: "pyro.infer.trace_mean_field_elbo.torch_item",
}


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


@dataclass(frozen=True)
class Update:
    """What moves one parameter, and whose learning rate it takes.

    Attributes:
        adam: the optimizer of this parameter alone.
        group: the position of its learning rate.
    """

    adam: Adam
    group: int


def can_be_compiled(elbo: ELBO, parameters: Sequence[Tensor], owners: Sequence[Callable]) -> bool:
    """Whether compiling may be tried without being asked for.

    Args:
        elbo: the loss.
        parameters: what is trained.
        owners: model and guide.
    """
    if not in_modules(parameters, owners):
        return False
    if any(parameter.device.type == "cpu" for parameter in parameters) and not _has_compiler():
        return False
    return type(elbo) in _READS


def in_modules(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> bool:
    """Whether every parameter belongs to a module of the owners, model and guide."""
    try:
        _slots(parameters, owners)
    except CannotCompile:
        return False
    return True


def reason_of(error: BaseException) -> str:
    """Why something could not be compiled, in a line: what inductor and dynamo append is pages long."""
    return " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])


def _has_compiler() -> bool:
    names = [os.environ.get("CXX", ""), "g++", "clang++", "cl" if sys.platform == "win32" else ""]
    return any(name and shutil.which(name) for name in names)


class CompiledStep:
    """Takes the steps of a training by one graph for each kind of arguments.

    Every graph is compared with the eager step under one seed before it is used. What cannot be traced, compiled, or
    differs, is evaluated eagerly, with a warning that says why: then the answer is a slope that nothing has moved by.

    Args:
        eager: the eager gradient.
        model: the model, its parameters in modules.
        guide: the guide, its parameters in modules.
        elbo: ``Trace_ELBO`` or ``TraceMeanField_ELBO``.
        updates: what moves each parameter, ``None`` to give the gradient and move nothing.
        tables: what moves each table, by name.
        clip_norm: the largest norm of the gradient.

    Attributes:
        rates: the learning rate of each group.
        seconds: the time spent in compiling.
    """

    # Shapes are baked in. More of them than a full and a last batch are no case for compiling.
    max_graphs = 4

    def __init__(
        self,
        eager: Gradient,
        model: Callable,
        guide: Callable,
        elbo: ELBO,
        updates: Sequence[Update] | None,
        tables: Mapping[str, Update],
        clip_norm: float | None,
    ):
        self._eager, self._model, self._guide, self._elbo = eager, model, guide, elbo
        self._moves, self._updates, self._tables = updates is not None, list(updates or ()), dict(tables)
        self._clip_norm = clip_norm
        self._graphs: dict[tuple, Callable | None] = {}
        of_tables = [update.adam.parameter for update in self._tables.values()]
        self._trained = [*eager.parameters, *of_tables]
        self._values = [torch.atleast_1d(parameter.detach()) for parameter in self._trained]
        # Moments and visits of each.
        self._states = (
            [update.adam.states[1:] for update in (*self._updates, *self._tables.values())] if self._moves else []
        )
        self.rates: Sequence[float] = ()
        self._rate_tensors: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> Slope:
        """Take one step, or give the slope of one."""
        leaves, tree, signature = take_apart(call, kwargs)
        if signature not in self._graphs:
            started = time.perf_counter()
            self._graphs[signature] = self._compile(leaves, tree, call, kwargs)
            self.seconds += time.perf_counter() - started
        graph = self._graphs[signature]
        return self._eager(call, kwargs) if graph is None else graph([x for x in leaves if isinstance(x, Tensor)])

    def set_rates(self, rates: Sequence[float]) -> None:
        """Write the learning rate of each group where graphs read it."""
        if not self._rate_tensors:
            self._rate_tensors = [self._values[0].new_tensor([rate]) for rate in rates]
        elif rates != self.rates:
            for tensor, rate in zip(self._rate_tensors, rates, strict=True):
                tensor.fill_(rate)
        self.rates = rates

    @property
    def own(self) -> list[Tensor]:
        """What a step reads and moves: parameters, moments and visits, learning rates."""
        return tree_flatten((self._values, self._states, self._rate_tensors))[0]

    def move_to(self, own: Sequence[Tensor]) -> None:
        """Keep from now on what :attr:`own` gives in these tensors, which have the same values."""
        parts = tree_flatten((self._values, self._states, self._rate_tensors))[1]
        self._values, self._states, self._rate_tensors = tree_unflatten(list(own), parts)
        for parameter, value in zip(self._trained, self._values, strict=True):
            parameter.data = value.view(parameter.shape)
        updates = (*self._updates, *self._tables.values())
        for update, value, states in zip(updates, self._values, self._states, strict=True):
            update.adam.states = [value, *states]

    def _compile(
        self, leaves: list, tree, call: tuple, kwargs: Mapping[str, Any]
    ) -> Callable[[list[Tensor]], Slope] | None:
        try:
            if len(self._graphs) == self.max_graphs:
                raise CannotCompile(f"its arguments come in more than {self.max_graphs} shapes")
            # Tracing draws, comparing draws: the training's own draws are those of eager steps all the same.
            # What inductor deprecates of itself is nothing a caller could mend.
            with seeded(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Eagerly first: what a guide has to find out about new shapes is not to become part of the graph.
                slope = self._eager(call, kwargs)
                with self.given_back(slope):
                    graph = self._graph(leaves, tree)
                self._compare(slope, graph, [x for x in leaves if isinstance(x, Tensor)])
        except (CannotCompile, RuntimeError, NotImplementedError) as reason:
            warnings.warn(f"The training step is taken eagerly, not compiled: {reason_of(reason)}.", stacklevel=2)
            return None
        return graph

    def _graph(self, leaves: list, tree) -> Callable[[list[Tensor]], Slope]:
        traced = self.trace(leaves, tree)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        own, draws = traced.own, traced.draws
        compiled = compile_graph(traced.graph, [*own, *tensors, *draws()], with_draws=not traced.drawn)

        @torch.no_grad()
        def graph(tensors: list[Tensor]) -> Slope:
            out = compiled(*own, *tensors, *draws())
            if self._moves:
                return Slope(out[0], None, [])
            loss, grads, indices, of_rows = tree_unflatten(out, traced.outputs)
            return Slope(loss, grads, list(zip(traced.names, indices, of_rows, strict=True)))

        return graph

    def trace(self, leaves: list, tree) -> Traced:
        """The step as a graph, for arguments of these shapes.

        Args:
            leaves, tree: the arguments, taken apart.
        """
        slots = _slots(self._trained, (self._model, self._guide))
        read = _READS.get(type(self._elbo))
        if read is None:
            raise CannotCompile(f"{type(self._elbo).__name__} is none of {', '.join(elbo.__name__ for elbo in _READS)}")
        names: list[str] = []

        def pure(values: list[Tensor], states: list[list[Tensor]], rates: list[Tensor], tensors: list[Tensor]):
            given = iter(tensors)
            values_of_call = [next(given) if isinstance(x, Tensor) else x for x in leaves]
            call, kwargs = (
                (tuple(values_of_call), {}) if isinstance(tree, int) else tree_unflatten(values_of_call, tree)
            )
            # The guide itself takes the rows that a call reads out of its tables.
            own = [
                value.view(parameter.shape).detach().requires_grad_()
                for value, parameter in zip(values, self._eager.parameters, strict=False)
            ]
            with ExitStack() as stack:
                stack.enter_context(_in_place_of(slots, [*own, *values[len(own) :]]))
                stack.enter_context(patch(read, lambda value: value))
                # What modules register while they are traced belongs to the trace.
                stack.enter_context(pyro.get_param_store().scope())
                slope = self._eager.of(self._loss, own, call, kwargs)
            if self._moves:
                self._move(slope, values, states, rates)
                return slope.loss, [], [], []
            names[:] = [name for name, _, _ in slope.rows]
            return slope.loss, slope.grads, [index for _, index, _ in slope.rows], [grad for _, _, grad in slope.rows]

        own, parts = tree_flatten((self._values, self._states, self._rate_tensors))
        outputs = None

        def flat(*inputs: Tensor) -> list[Tensor | None]:
            nonlocal outputs
            values, states, rates = tree_unflatten(inputs[: len(own)], parts)
            out, outputs = tree_flatten(pure(values, states, rates, list(inputs[len(own) :])))
            return out

        with pyro.validation_enabled(False):
            traced = make_fx(flat)(*own, *(x for x in leaves if isinstance(x, Tensor)))
        own = [*own, *lift_tensors(traced, len(own))]
        program, drawn = lift_draws(traced)
        return Traced(traced, own, program.forward, drawn, names, outputs)

    @torch.no_grad()
    def _move(self, slope: Slope, values: Sequence[Tensor], states: Sequence[Sequence[Tensor]], rates) -> None:
        """Move values and states that stand in for those of the training."""
        slope = clipped(slope, self._clip_norm)
        updates = [*self._updates, *self._tables.values()]
        every = dict(zip(map(id, updates), zip(values, states, strict=True), strict=True))
        moves = [(update, None, grad) for update, grad in zip(self._updates, slope.grads, strict=True)]
        moves += [(self._tables[name], index, grad) for name, index, grad in slope.rows]
        for update, index, grad in moves:
            if grad is not None:
                value, state = every[id(update)]
                update.adam.move([value, *state], index, grad, rates[update.group])

    def _loss(self, *call, **kwargs) -> Tensor:
        """The differentiable loss alone, without the value that Pyro reads beside it."""
        traces = self._elbo._get_traces(self._model, self._guide, call, kwargs)
        losses = [self._elbo._differentiable_loss_particle(*pair)[1] for pair in traces]
        return sum(losses) / len(losses)

    def _places(self, slope: Slope) -> list[tuple[Tensor, Tensor | None]]:
        """All tensors that a step by this slope moves, and the rows of them."""
        if not self._moves:
            return []
        places = [(state, None) for update in self._updates for state in update.adam.states]
        indices = {name: index for name, index, _ in slope.rows}
        for name, update in self._tables.items():
            places += [(state, indices.get(name)) for state in update.adam.states]
        return places

    @contextmanager
    def given_back(self, slope: Slope):
        """Give everything that a step moves its value back: what runs inside is a trial."""
        places = self._places(slope)
        saved = [(state if index is None else state[index]).clone() for state, index in places]
        try:
            yield
        finally:
            with torch.no_grad():
                for (state, index), value in zip(places, saved, strict=True):
                    state.copy_(value) if index is None else state.index_copy_(0, index, value)

    def _compare(self, eager: Slope, graph: Callable[[list[Tensor]], Slope], tensors: list[Tensor]) -> None:
        expected = self.expected(eager)
        with self.given_back(eager):
            torch.manual_seed(0)
            self.check(expected, eager, graph(tensors))

    def expected(self, eager: Slope) -> list[Tensor]:
        """What a step by this slope gives, taken and given back."""
        with self.given_back(eager):
            if self._moves:
                self._move(eager, self._values, self._states, self.rates)
            return self._outcome(eager, eager)

    def check(self, expected: list[Tensor], eager: Slope, taken: Slope) -> None:
        """Refuse a graph that is not the eager step, as when the model branches on its data in Python.

        Args:
            expected: what the eager step gives.
            eager: its slope.
            taken: what the graph has given, by the same draws.
        """
        # Products of lower precision are added up in another order.
        single = eager.loss.dtype == torch.float32
        tolerance = 0.03 if self._eager.precision != "float32" else 1e-3 if single else 1e-6
        for one, two in zip(expected, self._outcome(eager, taken), strict=True):
            if not torch.linalg.vector_norm(one - two) <= tolerance * torch.linalg.vector_norm(one) + 1e-12:
                raise CannotCompile("its graph gives another loss or gradient than the eager step under one seed")

    def _outcome(self, eager: Slope, taken: Slope) -> list[Tensor]:
        parts = [taken.loss.reshape(1)]
        if self._moves:
            # First moments are gradients. What they move by is a sign where a gradient is all but zero.
            parts += [state if i is None else state[i] for state, i in self._places(eager)[1::4]]
        else:
            parts += [grad for grad in (*taken.grads, *(grad for _, _, grad in taken.rows)) if grad is not None]
        return [part.clone() for part in parts]


def take_apart(call: tuple, kwargs: Mapping[str, Any]) -> tuple[list, Any, tuple]:
    """The leaves of the arguments, their tree, and what a graph depends on of them."""
    # torch's walk through nests takes as long as a small graph.
    plain = not kwargs and all(isinstance(x, Tensor) for x in call)
    leaves, tree = (list(call), len(call)) if plain else tree_flatten((call, dict(kwargs)))
    return (
        leaves,
        tree,
        (tree, *((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)),
    )


def compile_graph(traced: GraphModule, inputs: Sequence[Tensor], *, with_draws: bool) -> Callable:
    """What inductor makes of a graph.

    Args:
        traced: the graph.
        inputs: examples, to whose shapes and strides it is bound without a check: the caller's signature is that.
        with_draws: whether the graph draws numbers itself.
    """
    for node in traced.graph.nodes:
        # Of the mode that it was traced in, which another part of inductor refuses.
        node.meta.pop("val", None)
    # The eager generator: inductor's own is slower on CPUs, and the same seed is to give the same draws.
    options = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    if not with_draws and all(x.device.type == "cpu" for x in inputs):
        # The calls between the kernels in C++ too, which halves what a small step takes.
        options["cpp_wrapper"] = True
    # Not by torch.compile, whose checks of every input at every call take longer than a small step.
    with torch.no_grad():
        return torch._inductor.compile(traced, list(inputs), options=options)


def _slots(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> list[tuple[nn.Module, str]]:
    """The module and name of each parameter."""
    # A method's parameters are those of the object it belongs to.
    roots = [getattr(owner, "__self__", owner) for owner in owners]
    modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
    known = {id(p): (module, name) for module in modules for name, p in module.named_parameters(recurse=False)}
    if not all(id(parameter) in known for parameter in parameters):
        raise CannotCompile("a parameter belongs to no module of model or guide")
    return [known[id(parameter)] for parameter in parameters]


@contextmanager
def _in_place_of(slots: Sequence[tuple[nn.Module, str]], values: Sequence[Tensor]):
    own = [module._parameters[name] for module, name in slots]
    for (module, name), value in zip(slots, values, strict=True):
        module._parameters[name] = value
    try:
        yield
    finally:
        for (module, name), parameter in zip(slots, own, strict=True):
            module._parameters[name] = parameter
