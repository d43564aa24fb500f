"""An isolated param store, so that every module trains its own tensors whatever the global store holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
from pyro import poutine
from torch import nn

from pyro_avi.lock import turn

__all__ = ["buffers_restored", "isolated_param_store"]


@contextmanager
def isolated_param_store() -> Iterator[None]:
    """A context for models and guides in which Pyro's param store holds no parameters of modules.

    Pyro's store knows parameters by name, and two models of one class have the same names: the second would be evaluated
    or trained with the first one's tensors. Inside this context no module is registered at first. Parameters of bare
    ``pyro.param`` statements are kept in the store alone, so they are copied into the context and back. Like the store, the
    context belongs to one thread at a time.
    """
    store = pyro.get_param_store()
    with turn():
        # get_state removes these references from the parameters; code around this context may still need them.
        references = [(x, x.unconstrained) for _, x in store.named_parameters() if "unconstrained" in vars(x)]
        state = _bare(store.get_state())
        try:
            with store.scope(state=state):
                try:
                    yield
                finally:
                    state.update(store.get_state())
        finally:
            # Also after an interruption, so that what was trained so far is kept.
            store.set_state(_bare(state))
            for parameter, reference in references:
                parameter.unconstrained = reference


@contextmanager
def buffers_restored(model: Callable) -> Iterator[None]:
    """A context for a run that is no step: the buffers of a model, such as running means, are the same afterwards."""
    inside = poutine.unwrap(model)
    root = getattr(inside, "__self__", inside)
    modules = root.modules() if isinstance(root, nn.Module) else ()
    held = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in held:
            buffer.copy_(value)
            module._buffers[name] = buffer


def _bare(state):
    names = [name for name, value in state["params"].items() if not isinstance(value, nn.Parameter)]
    return {kind: {name: entries[name] for name in names} for kind, entries in state.items()}
