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
from pyro_avi.seeds import seeded

__all__ = ["CompiledStep", "Update", "can_be_compiled"]

# Where each of these reads its loss into Python, which a graph cannot follow.
_READS = {
    Trace_ELBO: "pyro.infer.trace_elbo.torch_item",
    TraceMeanField_ELBO: "pyro.infer.trace_mean_field_elbo.torch_item",
}


class _CannotCompile(Exception):
    """Why a step is taken eagerly."""


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
    try:
        _slots(parameters, owners)
    except _CannotCompile:
        return False
    if any(parameter.device.type == "cpu" for parameter in parameters) and not _has_compiler():
        return False
    return type(elbo) in _READS


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
        rates: the learning rate of each group, set before a step.
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
        self._given_rates: list[float] = []
        self._rate_tensors: list[Tensor] = []
        self.seconds = 0.0

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> Slope:
        """Take one step, or give the slope of one."""
        # torch's walk through nests takes as long as a small graph.
        plain = not kwargs and all(isinstance(x, Tensor) for x in call)
        leaves, tree = (list(call), len(call)) if plain else tree_flatten((call, dict(kwargs)))
        signature = (tree, *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves))
        self._set_rates()
        if signature not in self._graphs:
            started = time.perf_counter()
            self._graphs[signature] = self._compile(leaves, tree, call, kwargs)
            self.seconds += time.perf_counter() - started
        graph = self._graphs[signature]
        return self._eager(call, kwargs) if graph is None else graph([x for x in leaves if isinstance(x, Tensor)])

    def _set_rates(self) -> None:
        """Write the learning rates where graphs read them."""
        if not self._rate_tensors:
            like = self._values[0]
            self._rate_tensors = [like.new_tensor([rate]) for rate in self.rates]
        for tensor, rate, given in zip(self._rate_tensors, self.rates, self._given_rates or self.rates, strict=True):
            if rate != given:
                tensor.fill_(rate)
        self._given_rates = list(self.rates)

    def _compile(
        self, leaves: list, tree, call: tuple, kwargs: Mapping[str, Any]
    ) -> Callable[[list[Tensor]], Slope] | None:
        try:
            if len(self._graphs) == self.max_graphs:
                raise _CannotCompile(f"its arguments come in more than {self.max_graphs} shapes")
            # Tracing draws, comparing draws: the training's own draws are those of eager steps all the same.
            # What inductor deprecates of itself is nothing a caller could mend.
            with seeded(0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Eagerly first: what a guide has to find out about new shapes is not to become part of the graph.
                slope = self._eager(call, kwargs)
                with self._given_back(slope):
                    graph = self._trace(leaves, tree)
                self._compare(slope, graph, [x for x in leaves if isinstance(x, Tensor)])
        except (_CannotCompile, RuntimeError, NotImplementedError) as reason:
            # The first lines: what inductor and dynamo append is pages long.
            first = " ".join((str(reason).strip() or type(reason).__name__).splitlines()[:2])
            warnings.warn(f"The training step is taken eagerly, not compiled: {first}.", stacklevel=2)
            return None
        return graph

    def _trace(self, leaves: list, tree) -> Callable[[list[Tensor]], Slope]:
        slots = _slots(self._trained, (self._model, self._guide))
        read = _READS.get(type(self._elbo))
        if read is None:
            raise _CannotCompile(
                f"{type(self._elbo).__name__} is none of {', '.join(elbo.__name__ for elbo in _READS)}"
            )
        names = []

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

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        with pyro.validation_enabled(False):
            traced = make_fx(flat)(*own, *tensors)
        own = [*own, *_lift(traced, len(own))]
        with torch.no_grad():
            # Not by torch.compile, whose checks of every input at every call take longer than a small step. The eager
            # generator: inductor's own is slower on CPUs, and the same seed is to give the same draws.
            compiled = torch._inductor.compile(traced, [*own, *tensors], options={"fallback_random": True})

        @torch.no_grad()
        def graph(tensors: list[Tensor]) -> Slope:
            out = compiled(*own, *tensors)
            if self._moves:
                return Slope(out[0], None, [])
            loss, grads, indices, of_rows = tree_unflatten(out, outputs)
            return Slope(loss, grads, list(zip(names, indices, of_rows, strict=True)))

        return graph

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
    def _given_back(self, slope: Slope):
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
        """Refuse a graph that is not the eager step, as when the model branches on its data in Python."""
        outcomes = []
        for taken in (None, graph):
            with self._given_back(eager):
                torch.manual_seed(0)
                slope = eager if taken is None else taken(tensors)
                if taken is None and self._moves:
                    self._move(eager, self._values, self._states, self.rates)
                parts = [slope.loss.reshape(1)]
                if self._moves:
                    # First moments are gradients. What they move by is a sign where a gradient is all but zero.
                    parts += [state if i is None else state[i] for state, i in self._places(eager)[1::4]]
                else:
                    parts += [grad for grad in (*slope.grads, *(grad for _, _, grad in slope.rows)) if grad is not None]
                outcomes.append([part.clone() for part in parts])
        # Products of lower precision are added up in another order.
        single = eager.loss.dtype == torch.float32
        tolerance = 0.03 if self._eager.precision != "float32" else 1e-3 if single else 1e-6
        for one, two in zip(*outcomes, strict=True):
            if not torch.linalg.vector_norm(one - two) <= tolerance * torch.linalg.vector_norm(one) + 1e-12:
                raise _CannotCompile("its graph gives another loss or gradient than the eager step under one seed")


def _lift(traced: GraphModule, position: int) -> list[Tensor]:
    """Make inputs of the tensors that the graph holds, as buffers of the model: they may change between steps.

    Args:
        traced: the graph, changed in place.
        position: the number of inputs to come before them.

    Returns:
        The tensors.
    """
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    held = [node for node in traced.graph.nodes if node.op == "get_attr"]
    # Numbers that the program writes as tensors are copied before they are used.
    held = [node for node in held if any("lift_fresh" not in str(user.target) for user in node.users)]
    lifted = []
    for node in held:
        lifted.append(getattr(traced, node.target))
        with traced.graph.inserting_after(placeholders[position + len(lifted) - 2]):
            placeholder = traced.graph.placeholder(f"held_{len(lifted)}")
        placeholders.insert(position + len(lifted) - 1, placeholder)
        node.replace_all_uses_with(placeholder)
        traced.graph.erase_node(node)
    traced.recompile()
    return lifted


def _slots(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> list[tuple[nn.Module, str]]:
    """The module and name of each parameter."""
    # A method's parameters are those of the object it belongs to.
    roots = [getattr(owner, "__self__", owner) for owner in owners]
    modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
    known = {id(p): (module, name) for module in modules for name, p in module.named_parameters(recurse=False)}
    if not all(id(parameter) in known for parameter in parameters):
        raise _CannotCompile("a parameter belongs to no module of model or guide")
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
