"""A training step as one compiled graph: loss, gradient and Adam.

The loss of a reparameterized Pyro model and guide is a pure function of the parameters, the arguments and the draws. It is
traced together with its gradient and with what moves the parameters, so that handlers and validation run once, at tracing,
and inductor joins the elementwise operations of all.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.compilation.call_signature import flatten_call
from pyro_avi.compilation.cuda_graph import make_graphed, warn_not_graphed
from pyro_avi.compilation.fallback import CannotCompile, log_graph, reason_of
from pyro_avi.compilation.inductor import compile_graph
from pyro_avi.compilation.lift_inputs import lift_draws, lift_tensors
from pyro_avi.compilation.module_slots import find_slots, parameters_replaced
from pyro_avi.optimization.adam import Adam
from pyro_avi.optimization.gradient import Gradient, LossAndGrads, clipped
from pyro_avi.optimization.precision import with_matmul_precision
from pyro_avi.optimization.traced_step import READS, TracedStep
from pyro_avi.param_store import buffers_restored
from pyro_avi.seeds import seeded

__all__ = ["CompiledStep", "Update"]


@dataclass(frozen=True)
class Update:
    """What moves one parameter, and whose learning rate it takes.

    Attributes:
        adam: the optimizer of this parameter alone.
        group: the position of its learning rate.
    """

    adam: Adam
    group: int


class CompiledStep:
    """Takes the steps of a training by one graph for each kind of arguments.

    Every graph is compared with the eager step under one seed before it is used. What cannot be traced, compiled, or
    differs, is evaluated eagerly, with a warning that says why: the result then holds all gradients, and no parameter has
    moved.

    Args:
        eager: the eager gradient.
        model: the model, its parameters in modules.
        guide: the guide, its parameters in modules.
        elbo: ``Trace_ELBO`` or ``TraceMeanField_ELBO``.
        updates: what moves each parameter, ``None`` to give the gradient and move nothing.
        tables: what moves each table, by name.
        clip_norm: the largest norm of the gradient.
        gather: for tables that are not to be part of the graph gives the rows that a call reads (``draws``, ``indices``,
            ``rows``); the result of a step then holds their clipped gradients, and they have not moved.

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
        gather: Callable[..., Any] | None = None,
    ):
        self._eager, self._model, self._guide, self._elbo = eager, model, guide, elbo
        self._moves, self._updates, self._tables = updates is not None, list(updates or ()), dict(tables)
        self._clip_norm, self._gather = clip_norm, gather
        self._graphs: dict[tuple | None, Callable | None] = {}
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

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> LossAndGrads:
        """Take one step, or return its loss and gradients."""
        try:
            leaves, tree, signature = flatten_call(call, kwargs)
        except CannotCompile as reason:
            if None not in self._graphs:
                self._graphs[None] = None
                _warn(reason)
            return self._eager(call, kwargs)
        if signature not in self._graphs:
            started = time.perf_counter()
            self._graphs[signature] = self._compile(leaves, tree, call, kwargs)
            self.seconds += time.perf_counter() - started
        graph = self._graphs[signature]
        return self._eager(call, kwargs) if graph is None else graph(*self._inputs(leaves, call, kwargs))

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
        """The positions of the rows that were gathered, where a graph needs them: to clip by the norm of their sums."""
        if self._clip_norm is None:
            return {}
        indices = gathered.indices.items()
        return {name: index.to(gathered.rows[name].device) for name, index in indices if index is not None}

    def set_rates(self, rates: Sequence[float]) -> None:
        """Write the learning rate of each group where graphs read it."""
        if not self._rate_tensors:
            # All that is trained may be outside of the graph.
            like = next(iter(self._values), torch.zeros(()))
            self._rate_tensors = [like.new_tensor([rate]) for rate in rates]
        elif rates != self.rates:
            for tensor, rate in zip(self._rate_tensors, rates, strict=True):
                tensor.fill_(rate)
        self.rates = rates

    @property
    def gathers(self) -> bool:
        """Whether a step is given rows of tables that are not in its graph."""
        return self._gather is not None

    @property
    def own(self) -> list[Tensor]:
        """What a step reads and moves: parameters, moments and visits, learning rates."""
        return tree_flatten((self._values, self._states, self._rate_tensors))[0]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What model and guide hold beside their parameters, by name."""
        modules = [part for part in (self._model, self._guide) if isinstance(part, nn.Module)]
        return {f"{at}.{name}": x for at, part in enumerate(modules) for name, x in part.named_buffers()}

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
    ) -> Callable[[list[Tensor], Any], LossAndGrads] | None:
        try:
            if len(self._graphs) == self.max_graphs:
                raise CannotCompile(f"its arguments come in more than {self.max_graphs} shapes")
            # Tracing draws, comparing draws: the training's own draws are those of eager steps all the same.
            # What inductor deprecates of itself is nothing a caller could mend.
            with seeded(0), buffers_restored(self._model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Eagerly first: what a guide has to find out about new shapes is not to become part of the graph.
                result = self._eager(call, kwargs)
                with self.rolled_back(result):
                    # Tracing takes a step: by the same rows, where they are drawn, as those that are given back.
                    torch.manual_seed(0)
                    graph, apart = self._graph(leaves, tree, *self._inputs(leaves, call, kwargs))
                self._compare(result, graph, lambda: self._inputs(leaves, call, kwargs))
        except (CannotCompile, RuntimeError, NotImplementedError, OSError) as reason:
            _warn(reason)
            return None
        log_graph("The training step")
        warn_not_graphed(apart)
        return graph

    def _graph(
        self, leaves: list, tree, examples: list[Tensor], gathered: Any
    ) -> tuple[Callable[[list[Tensor], Any], LossAndGrads], str | None]:
        """The graph, and why its kernels are launched apart on a CUDA device."""
        traced = self.trace(leaves, tree, examples, gathered)
        own, draws = traced.own, traced.draws
        compiled = compile_graph(traced.graph, [*own, *examples, *draws()], with_draws=not traced.drawn)
        compiled = with_matmul_precision(self._eager.precision, compiled)
        shapes = [x.shape for x in examples]

        def step(*tensors: Tensor) -> Sequence[Tensor]:
            return compiled(*own, *tensors, *draws())

        with torch.no_grad():
            step, apart = make_graphed(step, own, examples)

        @torch.no_grad()
        def graph(tensors: list[Tensor], gathered: Any) -> LossAndGrads:
            if gathered is not None and [x.shape for x in tensors] != shapes:
                raise ValueError(
                    f"Expected {shapes[-1][0]} rows in every call with arguments of these shapes, got {len(tensors[-1])}.\n"
                    "Pass the positions of the rows as an argument of the model, or train with compile=False."
                )
            out = step(*tensors)
            if self._moves:
                # Left to move are rows that were gathered for the graph.
                indices = [gathered.indices[name] for name in traced.names]
                return LossAndGrads(out[0], None, list(zip(traced.names, indices, out[1:], strict=True)))
            loss, grads, indices, of_rows = tree_unflatten(out, traced.outputs)
            return LossAndGrads(loss, grads, list(zip(traced.names, indices, of_rows, strict=True)))

        return graph, apart

    def trace(self, leaves: list, tree, examples: list[Tensor], gathered: Any = None) -> TracedStep:
        """The step as a graph, for arguments of these shapes.

        Args:
            leaves, tree: the arguments, taken apart.
            examples: the tensors that the graph is given: those of the arguments, and what is gathered.
            gathered: the rows among them.
        """
        slots = find_slots(self._trained, (self._model, self._guide))
        read = READS.get(type(self._elbo))
        if read is None:
            raise CannotCompile(f"{type(self._elbo).__name__} is none of {', '.join(elbo.__name__ for elbo in READS)}")
        names: list[str] = []

        def pure(values: list[Tensor], states: list[list[Tensor]], rates: list[Tensor], tensors: list[Tensor]):
            given = iter(tensors)
            values_of_call = [next(given) if isinstance(x, Tensor) else x for x in leaves]
            call, kwargs = (
                (tuple(values_of_call), {}) if isinstance(tree, int) else tree_unflatten(values_of_call, tree)
            )
            rows = gathered and gathered._replace(
                draws=dict(zip(gathered.draws, given, strict=False)),
                rows=dict(zip(gathered.rows, given, strict=False)),
                indices=gathered.indices | dict(zip(self._positions(gathered), given, strict=True)),
            )
            # The guide itself takes the rows that a call reads out of its other tables.
            own = [
                value.view(parameter.shape).detach().requires_grad_()
                for value, parameter in zip(values, self._eager.parameters, strict=False)
            ]
            with ExitStack() as stack:
                stack.enter_context(parameters_replaced(slots, [*own, *values[len(own) :]]))
                stack.enter_context(patch(read, lambda value: value))
                # What modules register while they are traced belongs to the trace.
                stack.enter_context(pyro.get_param_store().scope())
                result = self._eager.of(self._loss, own, call, kwargs, rows)
            if self._moves:
                rest = self._move(result, values, states, rates)
                names[:] = [name for name, _, _ in rest]
                return result.loss, [], [], [grad for _, _, grad in rest]
            names[:] = [name for name, _, _ in result.rows]
            return (
                result.loss,
                result.grads,
                [index for _, index, _ in result.rows],
                [grad for _, _, grad in result.rows],
            )

        own, parts = tree_flatten((self._values, self._states, self._rate_tensors))
        outputs = None

        def flat(*inputs: Tensor) -> list[Tensor | None]:
            nonlocal outputs
            values, states, rates = tree_unflatten(inputs[: len(own)], parts)
            out, outputs = tree_flatten(pure(values, states, rates, list(inputs[len(own) :])))
            return out

        with pyro.validation_enabled(False):
            traced = make_fx(flat)(*own, *examples)
        own = [*own, *lift_tensors(traced, len(own))]
        program, drawn = lift_draws(traced)
        return TracedStep(traced, own, program.forward, drawn, names, outputs)

    @torch.no_grad()
    def _move(
        self, result: LossAndGrads, values: Sequence[Tensor], states: Sequence[Sequence[Tensor]], rates
    ) -> list[tuple]:
        """Move values and states that stand in for those of the training; return the rows of no table of the graph."""
        result, finite = clipped(result, self._clip_norm), result.loss.isfinite()
        # By a loss that is not finite nothing moves, so that it can be told what it came from.
        rates = [rate * finite for rate in rates]
        updates = [*self._updates, *self._tables.values()]
        every = dict(zip(map(id, updates), zip(values, states, strict=True), strict=True))
        moves = [(update, None, grad) for update, grad in zip(self._updates, result.grads, strict=True)]
        moves += [(self._tables[name], index, grad) for name, index, grad in result.rows if name in self._tables]
        for update, index, grad in moves:
            if grad is not None:
                value, state = every[id(update)]
                grad = torch.where(finite, grad, 0.0)
                update.adam.move([value, *state], index, grad, rates[update.group])
        return [row for row in result.rows if row[0] not in self._tables]

    def _loss(self, *call, **kwargs) -> Tensor:
        """The differentiable loss alone, without the value that Pyro reads beside it."""
        traces = self._elbo._get_traces(self._model, self._guide, call, kwargs)
        losses = [self._elbo._differentiable_loss_particle(*pair)[1] for pair in traces]
        return sum(losses) / len(losses)

    def _places(self, result: LossAndGrads) -> list[tuple[Tensor, Tensor | None]]:
        """All tensors that a step with these gradients moves, and the rows of them."""
        if not self._moves:
            return []
        places = [(state, None) for update in self._updates for state in update.adam.states]
        indices = {name: index for name, index, _ in result.rows}
        for name, update in self._tables.items():
            places += [(state, indices.get(name)) for state in update.adam.states]
        return places

    @contextmanager
    def rolled_back(self, result: LossAndGrads):
        """Give everything that a step moves its value back: what runs inside is a trial."""
        places = self._places(result)
        saved = [(state if index is None else state[index]).clone() for state, index in places]
        try:
            yield
        finally:
            with torch.no_grad():
                for (state, index), value in zip(places, saved, strict=True):
                    state.copy_(value) if index is None else state.index_copy_(0, index, value)

    def _compare(
        self, eager: LossAndGrads, graph: Callable[[list[Tensor], Any], LossAndGrads], inputs: Callable
    ) -> None:
        expected = self.expected(eager)
        with self.rolled_back(eager):
            torch.manual_seed(0)
            self.check(expected, eager, graph(*inputs()))

    def expected(self, eager: LossAndGrads) -> list[Tensor]:
        """What a step with these gradients gives, taken and rolled back."""
        with self.rolled_back(eager):
            rest = self._move(eager, self._values, self._states, self.rates) if self._moves else eager.rows
            return self._outcome(eager, replace(eager, rows=rest))

    def check(self, expected: list[Tensor], eager: LossAndGrads, taken: LossAndGrads) -> None:
        """Refuse a graph that is not the eager step, as when the model branches on its data in Python.

        Args:
            expected: what the eager step gives.
            eager: its loss and gradients.
            taken: what the graph has given, by the same draws.
        """
        # Products of lower precision are added up in another order.
        single = eager.loss.dtype == torch.float32
        tolerance = 0.03 if self._eager.precision != "float32" else 1e-3 if single else 1e-6
        for one, two in zip(expected, self._outcome(eager, taken), strict=True):
            if not torch.linalg.vector_norm(one - two) <= tolerance * torch.linalg.vector_norm(one) + 1e-12:
                raise CannotCompile("its graph gives another loss or gradient than the eager step under one seed")

    def _outcome(self, eager: LossAndGrads, taken: LossAndGrads) -> list[Tensor]:
        parts = [taken.loss.reshape(1)]
        if self._moves:
            # First moments are gradients. What they move by is a sign where a gradient is all but zero.
            parts += [state if i is None else state[i] for state, i in self._places(eager)[1::4]]
        grads = [] if self._moves else taken.grads
        parts += [grad for grad in (*grads, *(grad for _, _, grad in taken.rows)) if grad is not None]
        return [part.clone() for part in parts]


def _warn(reason: Exception) -> None:
    warnings.warn(f"The training step is taken eagerly, not compiled: {reason_of(reason)}.", stacklevel=3)
    log_graph("The training step", reason_of(reason))
