"""A training step as a graph of tensor operations, and whether it can be one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import (
    ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.compilation.call_signature import flatten_call
from pyro_avi.compilation.fallback import CannotCompile
from pyro_avi.compilation.module_slots import find_slots
from pyro_avi.elbos.doubly_reparameterized import DoublyReparameterizedELBO
from pyro_avi.elbos.enumerated import EnumeratedELBO
from pyro_avi.elbos.importance_weighted import ImportanceWeightedELBO
from pyro_avi.elbos.leave_one_out import LeaveOneOutELBO
from pyro_avi.elbos.relaxed import RelaxedELBO
from pyro_avi.elbos.score_function import ScoreFunctionELBO
from pyro_avi.elbos.several_draws import SeveralDrawsELBO
from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.elbos.vimco import VimcoELBO
from pyro_avi.native.draws import natively
from pyro_avi.optimization.gradient import LossAndGrads
from pyro_avi.optimization.step_state import StepTensors
from pyro_avi.tracing.lift_draws import lift_draws
from pyro_avi.tracing.operations import record

__all__ = ["TracedStep", "check_can_be_traced", "surrogate_loss", "trace_step", "why_not_compiled"]

# What is known of these ELBOs: apart from the loss that they report, they read no number out of a tensor.
_TRACEABLE = (
    Trace_ELBO,
    StickingTheLandingELBO,
    TraceMeanField_ELBO,
    ScoreFunctionELBO,
    RelaxedELBO,
    LeaveOneOutELBO,
    ImportanceWeightedELBO,
    VimcoELBO,
    DoublyReparameterizedELBO,
    EnumeratedELBO,
    TraceEnum_ELBO,
)
# What comes close to others and can be compiled.
_INSTEAD: dict[type[ELBO], type[ELBO]] = {
    TraceGraph_ELBO: LeaveOneOutELBO,
    RenyiELBO: ImportanceWeightedELBO,
    TraceTMC_ELBO: VimcoELBO,
}


@dataclass(frozen=True)
class TracedStep:
    """A step as a graph of tensor operations.

    Attributes:
        graph: takes ``own``, the tensors of a call, and ``draws()``.
        own: what it reads and writes: parameters, moments, learning rates, and the buffers of model and guide.
        draws: draws from torch's random state what the step draws, into the same memory every time.
        drawn: whether the graph draws nothing itself.
        tables: the names of the tables whose gradients the graph returns.
        outputs: the structure of what it returns: the loss, gradients of parameters, and of the tables' rows.
    """

    graph: GraphModule
    own: list[Tensor]
    draws: Callable[[], list[Tensor]]
    drawn: bool
    tables: list[str]
    outputs: Any


def trace_step(
    step: Callable[[StepTensors, list[Tensor]], LossAndGrads], state: StepTensors, examples: Sequence[Tensor]
) -> TracedStep:
    """Trace a step.

    Args:
        step: takes what is in the place of the state, which it changes, and the tensors of a call. Of the rows of tables
            that it returns the gradients are kept, and the positions where there are any.
        state: the tensors that the graph reads and writes.
        examples: the tensors of a call.
    """
    own, parts = tree_flatten(state)
    tables: list[str] = []
    outputs = None

    def flat(*inputs: Tensor) -> list[Tensor | None]:
        nonlocal outputs
        result = step(tree_unflatten(inputs[: len(own)], parts), list(inputs[len(own) :]))
        tables[:] = [rows.table for rows in result.rows]
        grads, indices = [rows.grad for rows in result.rows], [rows.positions for rows in result.rows]
        out, outputs = tree_flatten((result.loss, list(result.grads or ()), indices, grads))
        return out

    with pyro.validation_enabled(False):
        traced, held = record(flat, [*own, *examples], held_at=len(own))
    program, drawn = lift_draws(traced)
    return TracedStep(traced, [*own, *held], natively(program) or program.forward, drawn, tables, outputs)


class _ItemIsTensor(TorchFunctionMode):
    """A context in which ``Tensor.item`` returns the tensor itself."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.item else func(*args, **(kwargs or {}))


class _WithoutBranches(TorchFunctionMode):
    """A context for expectations over enumerated values: Pyro leaves those without probability out, here they count zero.

    How many are left out is a number read out of a tensor.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.all:
            return False
        if func is torch.Tensor.masked_select:
            value, mask = args
            return torch.where(mask, value, torch.zeros_like(value))
        return func(*args, **(kwargs or {}))


def surrogate_loss(elbo: ELBO, model: Callable, guide: Callable, call: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The loss with the gradient of the estimator, as a tensor alone: Pyro reads the value of the ELBO as a number.

    Args:
        elbo: one that :func:`check_can_be_traced` accepts.
        model, guide: whose loss it is.
        call, kwargs: the arguments of both.
    """
    if isinstance(elbo, SeveralDrawsELBO):
        return elbo.differentiable_loss(model, guide, *call, **kwargs)
    if isinstance(elbo, TraceEnum_ELBO):
        # The model has run before its values are summed over: numbers that it reads out of tensors are found.
        pairs = list(elbo._get_traces(model, guide, call, kwargs))
        with _WithoutBranches():
            return -sum(_compute_dice_elbo(*pair) for pair in pairs) / elbo.num_particles
    losses = []
    for model_trace, guide_trace in elbo._get_traces(model, guide, call, kwargs):
        # Pyro turns the value into a number, which a graph cannot follow. The model has run by now: numbers that it reads
        # out of tensors are found while it is traced.
        with _ItemIsTensor():
            value, surrogate = elbo._differentiable_loss_particle(model_trace, guide_trace)
        # With scores, what is differentiated has another value than the loss.
        value = value.detach() if isinstance(value, Tensor) else value
        losses.append(value + (surrogate - surrogate.detach()))
    # Of particles that are drawn at once there is one trace.
    return sum(losses) / elbo.num_particles


def check_can_be_traced(elbo: ELBO) -> None:
    """Refuse an ELBO that is not known to be traceable.

    Raises:
        CannotCompile: if it is none of those.
    """
    if type(elbo) not in _TRACEABLE:
        known = ", ".join(each.__name__ for each in _TRACEABLE)
        instead = next((each.__name__ for kind, each in _INSTEAD.items() if isinstance(elbo, kind)), None)
        advice = "" if instead is None else f" (avi.{instead} comes close to it)"
        raise CannotCompile(f"{type(elbo).__name__} is none of {known}{advice}; pass one of them, or compile=False")


def why_not_compiled(
    elbo: ELBO, parameters: Sequence[Tensor], owners: Sequence[Callable], call: tuple, kwargs: Mapping[str, Any]
) -> str | None:
    """Why compiling may not be tried without being asked for, ``None`` where it may.

    Args:
        elbo: the loss.
        parameters: what is trained.
        owners: model and guide.
        call, kwargs: the arguments of the first step.
    """
    try:
        flatten_call(call, kwargs)
        check_can_be_traced(elbo)
        find_slots(parameters, owners)
    except CannotCompile as reason:
        return str(reason)
    return None
