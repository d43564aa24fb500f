"""Modules in evaluation mode, wherever a model or guide keeps them."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode() -> Iterator[None]:
    """Call every module in evaluation mode, and give it its own mode back afterwards.

    Dropout leaves nothing out, batch normalization reads its running statistics and does not move them. It holds for
    every module that is called inside, also for those that a model only knows by its closure, so that what is measured is
    one density and not one for every call. ``torch.nn.functional`` calls with a mode of their own are not seen.

    What ``torch.compile`` has compiled runs as it was written: measurements call it with shapes of their own, for which it
    would be compiled again and again, and differentiate it twice, which it does not support.

    Example::

        >>> import torch
        >>> from pyro_avi.evaluation_mode import evaluation_mode
        >>> dropout = torch.nn.Dropout(0.5)
        >>> with evaluation_mode():
        ...     dropout(torch.ones(3))
        tensor([1., 1., 1.])
        >>> dropout.training
        True
    """
    switched: dict[int, nn.Module] = {}

    def switch(module: nn.Module, args: tuple) -> None:
        if module.training:
            module.training = False
            switched[id(module)] = module

    handle = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        with _as_written():
            yield
    finally:
        handle.remove()
        for module in switched.values():
            module.training = True


@contextmanager
def _as_written() -> Iterator[None]:
    """A context in which nothing is compiled by ``torch.compile``, nor runs as it was."""
    # Importing torch's compiler takes seconds; who has compiled something has done so.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # Of the hook above, which works where nothing is compiled.
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        yield
