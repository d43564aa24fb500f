"""Runs of a model or guide apart from the program, which leave no trace in it."""

from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine

from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import seeded

__all__ = ["isolated_run", "untraced"]


@contextmanager
def untraced():
    """Run code hidden from ``torch.jit.trace``, so that sizes are numbers and not tensors."""
    # torch's stubs have one of these two functions and not the other.
    core: Any = torch._C
    state = core._get_tracing_state()
    core._set_tracing_state(None)
    try:
        yield
    finally:
        core._set_tracing_state(state)


@contextmanager
def isolated_run(seed: int | None = None):
    """Run a model or guide apart from the program: hidden from handlers, without gradients, modules in evaluation mode.

    The random state is restored afterwards.
    """
    with isolated_param_store(), seeded(seed), torch.no_grad(), poutine.block(), evaluation_mode():
        yield
