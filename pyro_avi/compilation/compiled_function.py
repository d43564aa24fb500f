"""A function of one tensor as one compiled graph, for functions that are evaluated thousands of times."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_avi.compilation.compile_cache import warnings_of_inductor_ignored
from pyro_avi.compilation.fallback import log_graph, reason_of
from pyro_avi.compilation.inductor import NO_COMPILER, compile_graph, has_compiler
from pyro_avi.tracing.operations import record

__all__ = ["compile_function"]


def compile_function(
    function: Callable[[Tensor], tuple[Tensor, ...]], one: Tensor, two: Tensor
) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
    """The function as one graph for arguments of one shape, without gradients; ``None``, with a warning, if it has none.

    Tensors that the function reads beside its argument are read by the graph too, with their values at the time. The graph
    is traced at one argument and compared with the function at another, which detects a function that branches on its
    argument in Python. The warning says what could not be traced or compiled, or that the numbers differ.

    Args:
        function: from a tensor to tensors, without draws of its own.
        one, two: two arguments.
    """
    if one.device.type == "cpu" and not has_compiler():
        log_graph("The log joint", NO_COMPILER)
        return None
    try:
        with warnings_of_inductor_ignored():
            traced, held = record(function, [one], held_at=1)
            compiled = compile_graph(traced, [one.contiguous(), *held], with_draws=False)

            def graph(argument: Tensor) -> tuple[Tensor, ...]:
                return compiled(argument.contiguous(), *held)

            found = graph(two)
        # A graph adds up in another order, and rounds differently.
        pairs = zip(found, function(two), strict=True)
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) for a, b in pairs):
            log_graph("The log joint")
            return graph
        reason = "its graph gives other numbers"
    except (RuntimeError, NotImplementedError, OSError) as error:
        reason = reason_of(error)
    log_graph("The log joint", reason)
    warnings.warn(f"The log joint is evaluated eagerly, not compiled: {reason}.", stacklevel=3)
    return None
