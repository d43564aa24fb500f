"""A training step as one compiled graph: loss, gradient and Adam.

The loss of a reparameterized Pyro model and guide is a pure function of the parameters, the arguments and the draws. It is
traced together with its gradient and with what moves the parameters, so that handlers and validation run once, at tracing,
and inductor joins the elementwise operations of all.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from pyro_avi.compilation.call_signature import flatten_call
from pyro_avi.compilation.compile_cache import warnings_of_inductor_ignored
from pyro_avi.compilation.cuda_graph import make_graphed, warn_not_graphed
from pyro_avi.compilation.fallback import CannotCompile, log_graph, reason_of
from pyro_avi.compilation.inductor import compile_graph
from pyro_avi.compilation.module_slots import find_slots, parameters_replaced
from pyro_avi.optimization.gradient import Gradient, LossAndGrads, RowGrads
from pyro_avi.optimization.precision import with_matmul_precision
from pyro_avi.optimization.step_state import StepState, StepTensors, Update
from pyro_avi.optimization.traced_step import TracedStep, check_can_be_traced, surrogate_loss, trace_step
from pyro_avi.param_store import buffers_restored
from pyro_avi.seeds import seeded

__all__ = ["CompiledStep"]


class CompiledStep:
    """Takes the steps of a training by one graph for each kind of arguments.

    Every graph is compared with the eager step under one seed before it is used. Where a step cannot be traced or compiled,
    or its graph gives other numbers, the loss and its gradient are evaluated eagerly, with a warning that says why, and
    returned; the caller then moves the parameters.

    Args:
        eager: the eager gradient.
        model: the model, its parameters in modules.
        guide: the guide, its parameters in modules.
        elbo: one that :func:`~pyro_avi.optimization.traced_step.check_can_be_traced` accepts.
        updates: the optimizer of each parameter, ``None`` to return the gradient and move nothing.
        tables: the optimizer of each table in the graph, by name.
        clip_norm: the largest norm of the gradient.
        gather: where tables are kept out of the graph, a function of a call that returns the rows which it reads
            (``draws``, ``indices``, ``rows``). A step then returns their clipped gradients, and the caller moves them.
        all_shapes: whether arguments of other shapes than the first ones have graphs too, asked for when there are such;
            otherwise their steps are eager.

    Attributes:
        state: what graphs read and write.
        seconds: the time spent in compiling.
    """

    # A graph is bound to the shapes of its arguments. Data that come in more shapes than a full and a last batch would be
    # compiled again and again.
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
        gather: Callable[..., Any] | None = None,
        *,
        all_shapes: Callable[[], bool] = lambda: True,
    ):
        self._eager, self._model, self._guide, self._elbo = eager, model, guide, elbo
        self._clips, self._gather, self._all_shapes = clip_norm is not None, gather, all_shapes
        # By signature; None where a step is taken eagerly.
        self._graphs: dict[tuple | None, Callable | None] = {}
        self._compiled: dict[tuple, tuple[Callable, TracedStep]] = {}
        self.state = StepState(eager.parameters, updates, tables, clip_norm)
        self.seconds = 0.0

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> LossAndGrads:
        """Take one step, or return its loss and gradients."""
        try:
            leaves, tree, signature = flatten_call(call, kwargs)
        except CannotCompile as reason:
            if None not in self._graphs:
                self._graphs[None] = None
                _warn(reason)
            return self._eager(call, kwargs)
        if signature not in self._graphs and self._graphs and not self._all_shapes():
            self._graphs[signature] = None
        if signature not in self._graphs:
            started = time.perf_counter()
            self._graphs[signature] = self._compile(leaves, tree, signature, call, kwargs)
            self.seconds += time.perf_counter() - started
        graph = self._graphs[signature]
        return self._eager(call, kwargs) if graph is None else graph(*self._inputs(leaves, call, kwargs))

    def graph_of(self, call: tuple, kwargs: Mapping[str, Any]) -> tuple[Callable, TracedStep, list[Tensor]] | None:
        """The compiled graph for such arguments, the step that it was traced from, and the tensors among the arguments.

        ``None`` before the first step with such arguments, and where their steps are eager.
        """
        leaves, _, signature = flatten_call(call, kwargs)
        if self._graphs.get(signature) is None:
            return None
        return *self._compiled[signature], [x for x in leaves if isinstance(x, Tensor)]

    def _inputs(self, leaves: list, call: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Tensor], Any]:
        """The tensors that a graph is given, and the rows among them that were gathered for it."""
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        if self._gather is None:
            return tensors, None
        gathered = self._gather(*call, **kwargs)
        if gathered.draws and self._elbo.num_particles > 1:
            raise CannotCompile("each of its particles draws rows, whose parameters are in host memory")
        return [
            *tensors,
            *gathered.draws.values(),
            *gathered.rows.values(),
            *self._positions(gathered).values(),
        ], gathered

    def _positions(self, gathered: Any) -> dict[str, Tensor]:
        """The positions of the gathered rows, where a graph needs them: to clip, gradients of equal rows are added up."""
        if not self._clips:
            return {}
        indices = gathered.indices.items()
        return {name: index.to(gathered.rows[name].device) for name, index in indices if index is not None}

    @property
    def gathers(self) -> bool:
        """Whether a step is given rows of tables that are not in its graph."""
        return self._gather is not None

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers of model and guide, by name."""
        modules = [part for part in (self._model, self._guide) if isinstance(part, nn.Module)]
        return {f"{at}.{name}": x for at, part in enumerate(modules) for name, x in part.named_buffers()}

    def _compile(
        self, leaves: list, tree, signature: tuple, call: tuple, kwargs: Mapping[str, Any]
    ) -> Callable[[list[Tensor], Any], LossAndGrads] | None:
        """The graph for arguments like these, compared with the eager step; ``None``, with a warning, where there is none."""
        try:
            if len(self._graphs) == self.max_graphs:
                raise CannotCompile(f"its arguments come in more than {self.max_graphs} shapes")
            # Tracing and comparing draw; the draws of the training are those of eager steps all the same.
            with seeded(0), warnings_of_inductor_ignored():
                # Eagerly first: a guide that meets new shapes sets itself up, which must not become part of the graph. All
                # begin at the same buffers, which the loss may depend on.
                with buffers_restored(self._model):
                    result = self._eager(call, kwargs)
                with self.state.rolled_back(result), buffers_restored(self._model):
                    # Tracing takes a step. Rows that are drawn must be those of the eager step, which are rolled back.
                    torch.manual_seed(0)
                    graph, parts, not_graphed = self._graph(leaves, tree, *self._inputs(leaves, call, kwargs))
                expected = self.expected(result)
                with self.state.rolled_back(result), buffers_restored(self._model):
                    torch.manual_seed(0)
                    self.check(expected, result, graph(*self._inputs(leaves, call, kwargs)))
        except (CannotCompile, RuntimeError, NotImplementedError, OSError) as reason:
            _warn(reason)
            return None
        self._compiled[signature] = parts
        log_graph("The training step")
        warn_not_graphed(not_graphed)
        return graph

    def _graph(
        self, leaves: list, tree, examples: list[Tensor], gathered: Any
    ) -> tuple[Callable[[list[Tensor], Any], LossAndGrads], tuple[Callable, TracedStep], str | None]:
        """The step by a compiled graph, that graph as traced, and why it is no CUDA graph on a CUDA device."""
        traced = self.trace(leaves, tree, examples, gathered)
        own, draws = traced.own, traced.draws
        compiled = compile_graph(traced.graph, [*own, *examples, *draws()], with_draws=not traced.drawn)
        compiled = with_matmul_precision(self._eager.precision, compiled)
        shapes = [x.shape for x in examples]

        def step(*tensors: Tensor) -> Sequence[Tensor]:
            return compiled(*own, *tensors, *draws())

        with torch.no_grad():
            step, not_graphed = make_graphed(step, own, examples)

        @torch.no_grad()
        def graph(tensors: list[Tensor], gathered: Any) -> LossAndGrads:
            if gathered is not None and [x.shape for x in tensors] != shapes:
                raise ValueError(
                    f"Expected {shapes[-1][0]} rows in every call with arguments of these shapes, got {len(tensors[-1])}.\n"
                    "Pass the positions of the rows as an argument of the model, or train with compile=False."
                )
            out = step(*tensors)
            if self.state.moves and not traced.tables:
                return LossAndGrads(out[0], None, [])
            loss, grads, indices, row_grads = tree_unflatten(out, traced.outputs)
            if self.state.moves:
                # The gathered rows are left for the caller to move.
                grads, indices = None, [gathered.indices[table] for table in traced.tables]
            return LossAndGrads(loss, grads, list(map(RowGrads, traced.tables, indices, row_grads)))

        return graph, (compiled, traced), not_graphed

    def trace(self, leaves: list, tree, examples: list[Tensor], gathered: Any = None) -> TracedStep:
        """The step as a graph, for arguments of these shapes.

        Args:
            leaves, tree: the arguments, flattened.
            examples: the tensors that the graph is given: those of the arguments, and what is gathered.
            gathered: the rows among them.
        """
        check_can_be_traced(self._elbo)
        slots = find_slots(self.state.parameters, (self._model, self._guide))

        def step(state: StepTensors, tensors: list[Tensor]) -> LossAndGrads:
            call, kwargs, rows = self._arguments(leaves, tree, tensors, gathered)
            # Tables are no parameters here: the guide makes the rows that it reads of them leaves of the gradient itself.
            parameters = [
                value.view(parameter.shape).detach().requires_grad_()
                for value, parameter in zip(state.values, self._eager.parameters, strict=False)
            ]
            with ExitStack() as stack:
                stack.enter_context(parameters_replaced(slots, [*parameters, *state.values[len(parameters) :]]))
                # Parameters that modules register while they are traced must not stay in the store.
                stack.enter_context(pyro.get_param_store().scope())
                result = self._eager.evaluate(self._loss, parameters, call, kwargs, rows)
            if not self.state.moves:
                return result
            # The positions of these rows are known outside.
            rest = [rows._replace(positions=None) for rows in self.state.move(result, state)]
            return LossAndGrads(result.loss, None, rest)

        return trace_step(step, self.state.tensors, examples)

    def _arguments(self, leaves: list, tree, tensors: list[Tensor], gathered: Any) -> tuple[tuple, dict[str, Any], Any]:
        """The arguments of a call and its gathered rows, with these tensors in the place of those flattened."""
        given = iter(tensors)
        values = [next(given) if isinstance(x, Tensor) else x for x in leaves]
        call, kwargs = (tuple(values), {}) if isinstance(tree, int) else tree_unflatten(values, tree)
        rows = gathered and gathered._replace(
            draws=dict(zip(gathered.draws, given, strict=False)),
            rows=dict(zip(gathered.rows, given, strict=False)),
            indices=gathered.indices | dict(zip(self._positions(gathered), given, strict=True)),
        )
        return call, kwargs, rows

    def _loss(self, *call, **kwargs) -> Tensor:
        return surrogate_loss(self._elbo, self._model, self._guide, call, kwargs)

    def expected(self, eager: LossAndGrads) -> list[Tensor]:
        """What a step with the eager gradients gives; it is taken and rolled back."""
        with self.state.rolled_back(eager):
            rest = self.state.move(eager, self.state.tensors) if self.state.moves else eager.rows
            return self.state.outcome(eager, replace(eager, rows=rest))

    def check(self, expected: list[Tensor], eager: LossAndGrads, taken: LossAndGrads) -> None:
        """Refuse a graph that is not the eager step, as when the model branches on its data in Python.

        Args:
            expected: what the eager step gives.
            eager: its loss and gradients.
            taken: the result of the graph, by the same draws.

        Raises:
            CannotCompile: if the two differ by more than rounding.
        """
        # A graph adds up products in another order, which shows more in lower precision.
        single = eager.loss.dtype == torch.float32
        tolerance = 0.03 if self._eager.precision != "float32" else 1e-3 if single else 1e-6
        for one, two in zip(expected, self.state.outcome(eager, taken), strict=True):
            if not torch.linalg.vector_norm(one - two) <= tolerance * torch.linalg.vector_norm(one) + 1e-12:
                raise CannotCompile("its graph gives another loss or gradient than the eager step under one seed")


def _warn(reason: Exception) -> None:
    warnings.warn(f"The training step is taken eagerly, not compiled: {reason_of(reason)}.", stacklevel=3)
    log_graph("The training step", reason_of(reason))
