"""What is not finite first in a training that diverges: data, the guide, the model's densities, or a gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.nn.utils import get_total_norm

from pyro_avi.optimization.gradient import Gradient
from pyro_avi.seeds import seeded

__all__ = ["are_finite", "explain", "wrong_parameters"]

# The number of draws that are tried: what is rarely not finite may need several to occur again.
_DRAWS = 5


def explain(
    model: Callable,
    guide: Callable,
    call: tuple,
    kwargs: Mapping[str, Any],
    *,
    gradient: Gradient | None = None,
    names: Mapping[int, str] | None = None,
) -> str | None:
    """What is not finite when model and guide are evaluated on a call, in a sentence.

    The first cause is named, in this order: data, draws of the guide, densities of the model, gradients.

    Args:
        model, guide: what is trained.
        call, kwargs: the arguments of both.
        gradient: the gradient of the loss; by default it is not checked.
        names: the names of the parameters, by their ids.

    Returns:
        The sentence, ``None`` where everything is finite.
    """
    with seeded(None), poutine.block(), pyro.validation_enabled(False):
        for _ in range(_DRAWS):
            found = _cause_in_traces(model, guide, call, kwargs)
            if found is None and gradient is not None:
                found = _cause_in_gradient(gradient, names or {}, call, kwargs)
            if found is not None:
                return found
    return None


def wrong_parameters(values: Mapping[str, Tensor], step: int, start: int) -> str | None:
    """Which parameters are not finite, and since when, in a sentence; ``None`` where all are.

    Args:
        values: the parameters by name.
        step: the step whose loss is not finite.
        start: the first step.
    """
    wrong = [name for name, value in values.items() if not are_finite({name: value})]
    if not wrong:
        return None
    if step == start:
        return f"Not finite from the start: {', '.join(wrong)}."
    return f"The gradient of step {step - 1} was not finite: it moved {', '.join(wrong)} to nan or infinity."


def are_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether all numbers of all tensors are finite."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault(tensor.device, []).append(tensor)
    return all(bool(get_total_norm(group, torch.inf).isfinite()) for group in groups.values())


@torch.no_grad()
def _cause_in_traces(model: Callable, guide: Callable, call: tuple, kwargs: Mapping[str, Any]) -> str | None:
    try:
        guide_trace = poutine.trace(guide).get_trace(*call, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*call, **kwargs)
    except (ValueError, RuntimeError):
        # The guide cannot be run; perhaps the model can.
        try:
            guide_trace, model_trace = None, poutine.trace(model).get_trace(*call, **kwargs)
        except (ValueError, RuntimeError):
            return None
    sites = [(name, site) for name, site in model_trace.nodes.items() if site["type"] == "sample"]
    for name, site in sites:
        value = site["value"]
        if site["is_observed"] and isinstance(value, Tensor) and not (_is_finite(value) or _is_finite(_density(site))):
            wrong = ~value.isfinite()
            first = tuple(wrong.nonzero()[0].tolist())
            count = f"{int(wrong.sum())} of {wrong.numel()} numbers"
            return f"The data at site {name!r} are not finite: {count}, the first at {first}."
    for name, site in guide_trace.nodes.items() if guide_trace is not None else ():
        if site["type"] == "sample" and isinstance(site["value"], Tensor):
            for what, numbers in (("draws", site["value"]), ("has the log density", _density(site))):
                if not _is_finite(numbers):
                    return f"The guide {what} {_first(numbers)} at site {name!r}: so are the parameters of its factor there."
    if guide_trace is not None:
        for name, site in sites:
            if not _is_finite(_density(site)):
                what = "likelihood of the data" if site["is_observed"] else "density of the latent"
                return f"The log {what} at site {name!r} of the model is {_first(_density(site))}."
    return None


def _density(site: Mapping[str, Any]) -> Tensor:
    """The log density of a site's value, 0 where it is masked."""
    density = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    density = torch.as_tensor(density)
    mask = site["mask"]
    if mask is None or mask is True:
        return density
    return torch.zeros_like(density) if mask is False else torch.where(mask, density, 0.0)


def _cause_in_gradient(
    gradient: Gradient, names: Mapping[int, str], call: tuple, kwargs: Mapping[str, Any]
) -> str | None:
    result = gradient(call, kwargs)
    parts = [(names.get(id(p), "?"), grad) for p, grad in zip(gradient.parameters, result.grads or (), strict=True)]
    parts += [(f"the rows of {name}", grad) for name, _, grad in result.rows]
    wrong = [name for name, grad in parts if grad is not None and not _is_finite(grad)]
    if not wrong:
        return None
    return f"Values and densities are finite; the gradient is not, in {', '.join(wrong)}."


def _is_finite(numbers: Tensor) -> bool:
    return bool(numbers.isfinite().all())


def _first(numbers: Tensor) -> float:
    return numbers[~numbers.isfinite()][0].item()
