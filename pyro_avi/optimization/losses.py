"""An ELBO with a model and a guide: whether it can be trained by, the latents that both must share, and the parameters."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceTailAdaptive_ELBO
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.param_store import buffers_restored
from pyro_avi.seeds import seeded

__all__ = [
    "HasDifferentiableLoss",
    "averages_restored",
    "check_elbo",
    "find_parameters",
    "forget_averages",
    "gives_loss",
    "is_average",
    "keeps_one_graph",
    "running_averages",
]

# The names of running averages that TraceGraph_ELBO keeps in the param store and updates at every evaluation.
_AVERAGES = "__baseline_avg_downstream_cost_"


@runtime_checkable
class HasDifferentiableLoss(Protocol):
    """An ELBO that returns its loss as a differentiable tensor; some of Pyro's call ``backward`` themselves."""

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The loss of one step."""
        ...


def check_elbo(elbo: Any) -> None:
    """Refuse an object that is no ELBO, or an ELBO that computes no loss.

    Raises:
        TypeError: if it is one of these.
    """
    if not isinstance(elbo, ELBO | HasDifferentiableLoss):
        raise TypeError(f"Expected one of Pyro's ELBOs, as pyro.infer.Trace_ELBO(), got {elbo!r}.")
    if isinstance(elbo, TraceTailAdaptive_ELBO):
        raise TypeError(
            "Expected an ELBO that computes its loss, got TraceTailAdaptive_ELBO, which gives inf at every step.\n"
            "Try one of the following fixes:\n"
            "- another bound of several particles: elbo=pyro.infer.RenyiELBO(num_particles=...)\n"
            "- train with it by pyro.infer.SVI"
        )


def gives_loss(elbo: ELBO) -> bool:
    """Whether an ELBO returns its loss as a differentiable tensor, and leaves the gradient to the caller."""
    return isinstance(elbo, HasDifferentiableLoss)


def keeps_one_graph(elbo: ELBO) -> bool:
    """Whether ``torch.jit`` traces an ELBO at the first call, so that it would use the table rows of that call for ever."""
    return type(elbo).__name__.startswith("Jit") and type(elbo).__module__.startswith("pyro.infer")


@dataclass
class _Latents:
    """The latents of the last run of a model and of a guide, in the way in which an ELBO runs them."""

    model: dict[str, Mapping] = field(default_factory=dict)
    guide: dict[str, Mapping] = field(default_factory=dict)

    def recorded(self, part: str, function: Callable) -> Callable:
        """The model or guide itself, whose runs are recorded here."""

        def run(*args, **kwargs):
            with poutine.trace() as capture:
                result = function(*args, **kwargs)
            sites = {name: site for name, site in capture.trace.nodes.items() if site["type"] == "sample"}
            setattr(self, part, {name: site for name, site in sites.items() if not site_is_subsample(site)})
            return result

        return run

    def check(self) -> None:
        """Refuse a model and a guide with different latents."""
        # Latents with a dimension for their values are summed out: no guide has to sample them.
        needed = {
            name
            for name, site in self.model.items()
            if not site["is_observed"] and site["infer"].get("_enumerate_dim") is None
        }
        given = {name for name, site in self.guide.items() if not site["infer"].get("is_auxiliary")}
        drawn = {name for name in given if not self.guide[name]["is_observed"]}
        missing = sorted(needed - set(self.guide))
        latents = {name for name, site in self.model.items() if not site["is_observed"]}
        needless = sorted(drawn - latents)
        if not missing and not needless:
            return
        parts = [f"none for {missing}"] if missing else []
        parts += [f"one for {needless}, which the model does not draw"] if needless else []
        raise ValueError(
            f"Expected a guide for the latents of the model, got {' and '.join(parts)}.\n"
            "Try one of the following fixes:\n"
            "- pass the model that the guide was made for\n"
            '- to sum discrete latents out: infer={"enumerate": "parallel"} at their sites, and '
            "elbo=pyro.infer.TraceEnum_ELBO(max_plate_nesting=...)\n"
            '- for draws of a guide that are no latents: infer={"is_auxiliary": True}'
        )


def find_parameters(
    elbo: ELBO, model: Callable, guide: Callable, call: tuple, kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], torch.device]:
    """The parameters that a loss depends on, and the device of the loss; tables may be on another one.

    Args:
        elbo: the loss.
        model, guide: the pair that it is evaluated for.
        call, kwargs: the arguments of both.

    Raises:
        ValueError: if model and guide have different latents, or nothing can be trained.
    """
    latents = _Latents()
    pair = (model, guide)
    if not keeps_one_graph(elbo):
        pair = latents.recorded("model", model), latents.recorded("guide", guide)
    evaluate = elbo.differentiable_loss if gives_loss(elbo) else elbo.loss_and_grads
    with seeded(None), averages_restored(), buffers_restored(model), warnings.catch_warnings():
        # Pyro warns of what is an error below.
        warnings.filterwarnings("ignore", "Found (vars in model but not guide|non-auxiliary vars in guide)")
        try:
            with poutine.trace(param_only=True) as capture:
                value = evaluate(*pair, *call, **kwargs)
        except Exception:
            if latents.model:
                latents.check()
            raise
    latents.check()
    sites = {name: site["value"] for name, site in capture.trace.nodes.items() if not is_average(name)}
    found = [value.unconstrained() for value in sites.values()]
    parameters = list({id(parameter): parameter for parameter in found if parameter.requires_grad}.values())
    if not parameters:
        raise ValueError("Expected a model or a guide with parameters to train, found none.")
    if not gives_loss(elbo):
        for parameter in parameters:
            parameter.grad = None
    return parameters, value.device if isinstance(value, Tensor) else parameters[0].device


def running_averages() -> dict[str, Tensor]:
    """Copies of the running averages of baselines, by their names in Pyro's param store."""
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items() if is_average(name)}


def is_average(name: str) -> bool:
    """Whether this is the name of a running average of a baseline."""
    return name.startswith(_AVERAGES)


def forget_averages() -> None:
    """Leave the running averages of baselines to begin anew: Pyro names them by the latents, which other trainings share."""
    store = pyro.get_param_store()
    for name in running_averages():
        del store[name]


@contextmanager
def averages_restored():
    """A context for an evaluation that is no step: the running averages of baselines are the same afterwards."""
    before = running_averages()
    try:
        yield
    finally:
        forget_averages()
        for name, value in before.items():
            pyro.get_param_store()[name] = value
