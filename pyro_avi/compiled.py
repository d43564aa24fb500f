"""The loss of one step and its gradient as one compiled graph.

The loss of a reparameterized Pyro model and guide is a pure function of the parameters, the arguments and the draws. It is
traced together with its gradient, so that handlers and validation run once, at tracing, and inductor joins the
elementwise operations of both.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.gradient import Gradient, Slope

__all__ = ["CompiledGradient"]

# Where each of these reads its loss into Python, which a graph cannot follow.
_READS = {
    Trace_ELBO: "pyro.infer.trace_elbo.torch_item",
    TraceMeanField_ELBO: "pyro.infer.trace_mean_field_elbo.torch_item",
}


class _CannotCompile(Exception):
    """Why a loss is evaluated eagerly."""


class CompiledGradient:
    """Evaluates the loss of a call and its gradient by one graph for each kind of arguments.

    Every graph is compared with the eager gradient under one seed before it is used. What cannot be traced, compiled, or
    differs, is evaluated eagerly, with a warning that says why.

    Args:
        eager: the eager gradient.
        model: the model, its parameters in modules.
        guide: the guide, its parameters in modules.
        elbo: ``Trace_ELBO`` or ``TraceMeanField_ELBO``.
    """

    # Shapes are baked in. More of them than a full and a last batch are no case for compiling.
    max_graphs = 4

    def __init__(self, eager: Gradient, model: Callable, guide: Callable, elbo: ELBO):
        self._eager, self._model, self._guide, self._elbo = eager, model, guide, elbo
        self._graphs: dict[tuple, Callable | None] = {}

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> Slope:
        """The loss and gradient of one call."""
        leaves, tree = tree_flatten((call, dict(kwargs)))
        signature = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves)
        if signature not in self._graphs:
            self._graphs[signature] = self._compile(leaves, tree, call, kwargs)
        graph = self._graphs[signature]
        return self._eager(call, kwargs) if graph is None else graph([x for x in leaves if isinstance(x, Tensor)])

    def _compile(
        self, leaves: list, tree, call: tuple, kwargs: Mapping[str, Any]
    ) -> Callable[[list[Tensor]], Slope] | None:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        try:
            if len(self._graphs) == self.max_graphs:
                raise _CannotCompile(f"its arguments come in more than {self.max_graphs} shapes")
            # Tracing draws, comparing draws: the training's own draws are those of eager steps all the same.
            # What inductor deprecates of itself is nothing a caller could mend.
            with torch.random.fork_rng(devices), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Eagerly first: what a guide has to find out about new shapes is not to become part of the graph.
                torch.manual_seed(0)
                eager = self._eager(call, kwargs)
                graph = self._trace(leaves, tree)
                torch.manual_seed(0)
                _compare(eager, graph([x for x in leaves if isinstance(x, Tensor)]))
        except (_CannotCompile, RuntimeError, NotImplementedError) as reason:
            # The first lines: what inductor and dynamo append is pages long.
            first = " ".join((str(reason).strip() or type(reason).__name__).splitlines()[:2])
            warnings.warn(f"The training step is taken eagerly, not compiled: {first}.", stacklevel=2)
            return None
        return graph

    def _trace(self, leaves: list, tree) -> Callable[[list[Tensor]], Slope]:
        slots = _slots(self._eager.parameters, (self._model, self._guide))
        read = _READS.get(type(self._elbo))
        if read is None:
            raise _CannotCompile(
                f"{type(self._elbo).__name__} is none of {', '.join(elbo.__name__ for elbo in _READS)}"
            )
        names = []

        def pure(parameters: list[Tensor], tensors: list[Tensor]):
            given = iter(tensors)
            call, kwargs = tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], tree)
            with ExitStack() as stack:
                stack.enter_context(_in_place_of(slots, parameters))
                stack.enter_context(patch(read, lambda value: value))
                # What modules register while they are traced belongs to the trace.
                stack.enter_context(pyro.get_param_store().scope())
                slope = self._eager.of(self._loss, parameters, call, kwargs)
            names[:] = [name for name, _, _ in slope.rows]
            return slope.loss, slope.grads, [index for _, index, _ in slope.rows], [grad for _, _, grad in slope.rows]

        tensors = [x for x in leaves if isinstance(x, Tensor)]
        values = [parameter.detach().requires_grad_() for parameter in self._eager.parameters]
        with pyro.validation_enabled(False):
            traced = make_fx(pure)(values, tensors)
        # The eager generator: inductor's own is slower on CPUs, and the same seed is to give the same draws.
        compiled = torch.compile(traced, fullgraph=True, dynamic=False, options={"fallback_random": True})

        @torch.no_grad()
        def graph(tensors: list[Tensor]) -> Slope:
            loss, grads, indices, of_rows = compiled([p.detach() for p in self._eager.parameters], tensors)
            return Slope(loss, grads, list(zip(names, indices, of_rows, strict=True)))

        return graph

    def _loss(self, *call, **kwargs) -> Tensor:
        """The differentiable loss alone, without the value that Pyro reads beside it."""
        traces = self._elbo._get_traces(self._model, self._guide, call, kwargs)
        losses = [self._elbo._differentiable_loss_particle(*pair)[1] for pair in traces]
        return sum(losses) / len(losses)


def _compare(eager: Slope, compiled: Slope) -> None:
    """Refuse a graph that is not the eager gradient, as when the model branches on its data in Python."""
    tolerance = 1e-3 if eager.loss.dtype == torch.float32 else 1e-6
    parts = []
    for slope in (eager, compiled):
        grads = [*slope.grads, *(grad for _, _, grad in slope.rows)]
        parts.append([slope.loss.reshape(1), *(grad for grad in grads if grad is not None)])
    for one, two in zip(*parts, strict=True):
        if not torch.linalg.vector_norm(one - two) <= tolerance * torch.linalg.vector_norm(one) + 1e-12:
            raise _CannotCompile("its graph gives another loss or gradient than the eager step under one seed")


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
