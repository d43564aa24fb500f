"""A training step as a graph of tensor operations, and whether it can be one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.fx import GraphModule

from pyro_avi.compilation.call_signature import flatten_call
from pyro_avi.compilation.fallback import CannotCompile
from pyro_avi.compilation.module_slots import in_modules
from pyro_avi.optimization.sticking_the_landing import StickingTheLandingELBO

__all__ = ["READS", "TracedStep", "can_be_compiled"]

# Where each of these reads its loss into Python, which a graph cannot follow.
READS = {
    Trace_ELBO: "pyro.infer.trace_elbo.torch_item",
    StickingTheLandingELBO: "pyro.infer.trace_elbo.torch_item",
    TraceMeanField_ELBO: "pyro.infer.trace_mean_field_elbo.torch_item",
}


@dataclass(frozen=True)
class TracedStep:
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
        flatten_call(call, kwargs)
    except CannotCompile:
        return False
    return in_modules(parameters, owners) and type(elbo) in READS
