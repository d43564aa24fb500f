"""The training steps of several replicas as one graph, vectorized over the replicas."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_avi.compilation.call_signature import flatten_call
from pyro_avi.compilation.compile_cache import warnings_of_inductor_ignored
from pyro_avi.compilation.cuda_graph import make_graphed, warn_not_graphed
from pyro_avi.compilation.fallback import CannotCompile, log_graph
from pyro_avi.compilation.inductor import compile_graph
from pyro_avi.optimization.compiled_step import CompiledStep
from pyro_avi.optimization.gradient import LossAndGrads
from pyro_avi.optimization.precision import with_matmul_precision
from pyro_avi.optimization.step import TrainingStep
from pyro_avi.seeds import Stream, seeded
from pyro_avi.tracing.operations import record

__all__ = ["COMPILE_ERRORS", "VmappedStep", "SequentialStep"]

# The errors of a step that cannot be vectorized or compiled.
COMPILE_ERRORS = (CannotCompile, RuntimeError, NotImplementedError, OSError)


_Graph = Callable[[Sequence[tuple[Tensor, ...]], Sequence[Stream]], Tensor]


class VmappedStep:
    """Takes one step of every replica at once.

    The graph of the first replica's step is vectorized over the parameters and moments of the replicas, their arguments
    and their draws. It is compared with the eager step of every replica before it is used.

    Args:
        replicas: the steps of the trainings, of one structure and with no parameter in common, each compiled.
        seeds: of the draws of each.
        calls, kwargs: the arguments of the first step, see :meth:`step`.

    Attributes:
        seconds: the time spent in compiling.

    Raises:
        CannotCompile: if they are not of one structure; another of :data:`COMPILE_ERRORS` if their step cannot be compiled.
    """

    def __init__(
        self, replicas: Sequence[TrainingStep], seeds: Sequence[int], calls: Sequence[tuple], kwargs: Mapping[str, Any]
    ):
        self._replicas = replicas
        self._steps = [replica.compiled for replica in replicas if replica.compiled is not None]
        self._streams = [Stream(seed) for seed in seeds]
        self._graphs: dict[tuple, _Graph] = {}
        self.seconds = 0.0
        self._set_rates(0)
        if any(step.gathers for step in self._steps):
            raise CannotCompile("tables are in host memory")
        tensors = [step.state.flat() for step in self._steps]
        shapes = [[x.shape for x in own] for own in tensors]
        for position, own in enumerate(shapes):
            if own != shapes[0]:
                raise CannotCompile(f"replica {position} has parameters of other shapes than replica 0")
        self._own = [torch.stack(by_replica) for by_replica in zip(*tensors, strict=True)]
        for position, step in enumerate(self._steps):
            step.state.move_to([x[position] for x in self._own])
        try:
            self._find_graph(calls, kwargs)
        except COMPILE_ERRORS:
            self.release()
            raise

    def step(self, step: int, calls: Sequence[tuple], kwargs: Mapping[str, Any]) -> Tensor:
        """Move the parameters of all; return the losses ``[R]`` before.

        Args:
            step: the number of steps taken before.
            calls: the positional arguments of each replica.
            kwargs: those that they share.
        """
        for replica, call in zip(self._replicas, calls, strict=True):
            replica.check_rows(*call, **kwargs)
        self._set_rates(step)
        graph, tensors = self._find_graph(calls, kwargs)
        return graph(tensors, self._streams)

    def _set_rates(self, step: int) -> None:
        for replica, compiled in zip(self._replicas, self._steps, strict=True):
            compiled.state.set_rates(replica.rates(step))

    def _find_graph(self, calls, kwargs) -> tuple[_Graph, list[tuple[Tensor, ...]]]:
        """The graph for these arguments, and their tensors by replica."""
        leaves, trees, signatures = zip(*(flatten_call(call, kwargs) for call in calls), strict=True)
        tensors = [by_replica for by_replica in zip(*leaves, strict=True) if isinstance(by_replica[0], Tensor)]
        shared = tuple(all(x is by_replica[0] for x in by_replica) for by_replica in tensors)
        signature = (signatures[0], shared)
        if signature not in self._graphs:
            if any(other != signatures[0] for other in signatures):
                raise CannotCompile("their arguments are of different shapes")
            if len(self._graphs) == self._steps[0].max_graphs:
                raise CannotCompile(f"their arguments come in more than {len(self._graphs)} shapes")
            started = time.perf_counter()
            self._graphs[signature] = self._compile(leaves[0], trees[0], tensors, shared, calls, kwargs)
            self.seconds += time.perf_counter() - started
        return self._graphs[signature], tensors

    def release(self) -> None:
        """Give every replica memory of its own again."""
        for position, step in enumerate(self._steps):
            step.state.move_to([x[position].clone() for x in self._own])

    def _compile(self, leaves, tree, tensors, shared, calls, kwargs) -> _Graph:
        results = []
        for replica, call in zip(self._replicas, calls, strict=True):
            # Modules of one class have the same names in the store.
            with seeded(0), pyro.get_param_store().scope():
                results.append(replica.gradient(call, kwargs))
        with seeded(0), warnings_of_inductor_ignored():
            with self._rolled_back(results):
                graph, not_graphed = self._graph(leaves, tree, tensors, shared)
            expected = [step.expected(result) for step, result in zip(self._steps, results, strict=True)]
            with self._rolled_back(results):
                losses = graph(tensors, [Stream(0) for _ in self._steps])
                for step, one, result, loss in zip(self._steps, expected, results, losses, strict=True):
                    step.check(one, result, LossAndGrads(loss, None, []))
        log_graph("The training step of all replicas")
        warn_not_graphed(not_graphed)
        return graph

    @contextmanager
    def _rolled_back(self, results: Sequence[LossAndGrads]):
        with ExitStack() as stack:
            for step, result in zip(self._steps, results, strict=True):
                stack.enter_context(step.state.rolled_back(result))
            yield

    def _graph(self, leaves, tree, tensors, shared) -> tuple[_Graph, str | None]:
        """The compiled graph, and why it is no CUDA graph on a CUDA device."""
        traced = self._steps[0].trace(leaves, tree, [by_replica[0] for by_replica in tensors])
        if not traced.drawn:
            raise CannotCompile("a step draws numbers that depend on others")
        # Other tensors that models and guides hold are those of the first one; the comparison tells if they differ.
        held = [_stacked_buffers(x, self._steps) for x in traced.own[len(self._own) :]]
        own = [*self._own, *(x for x, _ in held)]

        def given(tensors: Sequence[tuple[Tensor, ...]], streams: Sequence[Stream]) -> list[Tensor]:
            arguments = [x[0] if same else torch.stack(x) for x, same in zip(tensors, shared, strict=True)]
            return [*arguments, *_draw(traced.draws, streams)]

        examples = given(tensors, [Stream(0) for _ in self._steps])
        dims = [0] * len(self._own) + [dim for _, dim in held] + [None if same else 0 for same in shared]
        dims += [0] * (len(own) + len(examples) - len(dims))
        vectorized = torch.func.vmap(lambda *inputs: traced.graph(*inputs)[0], in_dims=tuple(dims))
        with torch.no_grad():
            graph, more = record(lambda *inputs: [vectorized(*inputs)], [*own, *examples], held_at=len(own))
            own += more
            compiled = compile_graph(graph, [*own, *examples], with_draws=False)
        compiled = with_matmul_precision(self._replicas[0].gradient.precision, compiled)

        def step(*tensors: Tensor) -> Sequence[Tensor]:
            return compiled(*own, *tensors)

        with torch.no_grad():
            step, not_graphed = make_graphed(step, own, examples)

        @torch.no_grad()
        def losses(tensors: Sequence[tuple[Tensor, ...]], streams: Sequence[Stream]) -> Tensor:
            return step(*given(tensors, streams))[0]

        return losses, not_graphed


def _stacked_buffers(held: Tensor, steps: Sequence[CompiledStep]) -> tuple[Tensor, int | None]:
    """A tensor that the first step holds; where it is a buffer that others have with other values, those of all, stacked."""
    buffers = [step.buffers for step in steps]
    for name, buffer in buffers[0].items():
        if buffer.shape == held.shape and buffer.data_ptr() == held.data_ptr():
            each = [own[name] for own in buffers if name in own and own[name].shape == held.shape]
            if len(each) == len(steps) and not all(torch.equal(one, held) for one in each):
                return torch.stack(each), 0
    return held, None


class SequentialStep:
    """Takes the steps of the replicas one after another, each as it would be taken alone.

    Args:
        replicas, seeds: as for :class:`VmappedStep`.
    """

    def __init__(self, replicas: Sequence[TrainingStep], seeds: Sequence[int]):
        self._replicas, self._streams = replicas, [Stream(seed) for seed in seeds]

    @property
    def seconds(self) -> float:
        """The time spent in compiling."""
        return sum(replica.compiled.seconds for replica in self._replicas if replica.compiled is not None)

    def step(self, step: int, calls: Sequence[tuple], kwargs: Mapping[str, Any]) -> Tensor:
        """As :meth:`VmappedStep.step`."""
        losses = []
        for replica, stream, call in zip(self._replicas, self._streams, calls, strict=True):
            with stream, pyro.get_param_store().scope():
                losses.append(replica.step(step, call, kwargs))
        return torch.stack(losses)

    def release(self) -> None:
        """Nothing: every replica has its own memory all along."""


def _draw(program: Callable[[], list[Tensor]], streams: Sequence[Stream]) -> list[Tensor]:
    """What the program draws from each stream, stacked."""
    drawn = []
    for stream in streams:
        with stream:
            # The program draws into the same memory every time.
            drawn.append([x.clone() for x in program()])
    return [torch.stack(by_stream) for by_stream in zip(*drawn, strict=True)]
