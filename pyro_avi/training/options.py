"""Checks of the options of a training, made before any work is done."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import nn

from pyro_avi.errors import check_count
from pyro_avi.optimization.losses import check_elbo
from pyro_avi.optimization.precision import PRECISIONS

__all__ = ["check_keywords", "check_options", "check_optimizer"]

_MEANT = {
    "epochs": "num_steps=, counted in batches",
    "num_epochs": "num_steps=, counted in batches",
    "steps": "num_steps=",
    "num_iterations": "num_steps=",
    "learning_rate": "lr=",
    "optim": "optimizer=",
    "loss": "elbo=",
    "batch_size": "batches=avi.minibatches(..., batch_size=)",
    "num_particles": "elbo=pyro.infer.Trace_ELBO(num_particles=)",
    "num_samples": "elbo=pyro.infer.Trace_ELBO(num_particles=)",
    "device": "model.to(device), guide.to(device) and data that are there",
    "dtype": "model.to(dtype), guide.to(dtype) and data of that type",
    "verbose": "progress=",
    "callback": "callbacks=[...]",
    "distributed": "distributed= of avi.fit, which trains one model on many devices",
}


def check_options(
    num_steps: int,
    elbo: Any,
    lr: Any,
    clip_norm: float | None,
    precision: str,
    compile: Any,
    kl_weight: Any = 1.0,
) -> None:
    """Check the options of a training.

    Args:
        num_steps, elbo, lr, clip_norm, precision, compile, kl_weight: as for :func:`~pyro_avi.fit`.

    Raises:
        TypeError, ValueError: if one is not as :func:`~pyro_avi.fit` describes it.
    """
    check_elbo(elbo)
    check_count("num_steps", num_steps)
    for rate in lr.values() if isinstance(lr, Mapping) else [lr]:
        _check_rate("lr", rate)
    _check_rate("kl_weight", kl_weight)
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"Expected clip_norm > 0, got {clip_norm}.")
    if precision not in PRECISIONS:
        raise ValueError(f"Expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if not (isinstance(compile, bool) or compile == "auto"):
        raise ValueError(f"Expected compile to be 'auto', True or False, got {compile!r}.")


def _check_rate(name: str, rate: Any) -> None:
    number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not callable(rate) and not (number and 0 <= rate < math.inf):
        raise ValueError(f"Expected {name} to be a number of at least 0 or a function of the step, got {rate!r}.")


def check_optimizer(optimizer: Any) -> None:
    """Check that a function makes a ``torch.optim.Optimizer``.

    Raises:
        TypeError: if it is an optimizer already, or one of Pyro's.
    """
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, PyroOptim | torch.optim.Optimizer)):
        return
    raise TypeError(
        "Expected optimizer to make a torch.optim.Optimizer from parameter groups and lr=, got an object of "
        f"{type(optimizer).__module__}.{type(optimizer).__name__}.\n"
        "Pass a class, as optimizer=torch.optim.AdamW, or functools.partial(torch.optim.AdamW, weight_decay=...), with lr= "
        "beside it."
    )


def check_keywords(model: Callable, names: Iterable[str]) -> None:
    """Refuse keyword arguments that neither ``fit`` nor the model has: most are options under another library's name.

    Args:
        model: the model, to which all but the options of ``fit`` are passed on.
        names: the names of the arguments.

    Raises:
        TypeError: if the model does not take one of them.
    """
    try:
        taken = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters.values()
    except (TypeError, ValueError):
        # Functions written in C have no signature.
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return
    known = {parameter.name for parameter in taken if parameter.kind is not parameter.POSITIONAL_ONLY}
    for name in names:
        if name not in known:
            meant = f"\nDid you mean {_MEANT[name]}?" if name in _MEANT else ""
            raise TypeError(
                f"Expected options of avi.fit or keyword arguments of the model ({', '.join(sorted(known)) or 'it has none'}), "
                f"got {name}=.{meant}"
            )
