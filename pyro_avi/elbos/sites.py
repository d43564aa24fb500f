"""What the ELBOs ask of a guide's sites: which are latents, and how they are drawn."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.rows.uniform_subsample import UniformSubsample

__all__ = [
    "WithoutPath",
    "innermost",
    "is_determined",
    "is_drawn",
    "is_latent",
    "parameters_of",
    "score_of",
    "with_innermost",
]


def is_latent(site: Any) -> bool:
    """Whether a site draws a latent: it is neither observed nor the draw of a plate's rows."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not isinstance(site["fn"], UniformSubsample)
    )


def is_drawn(site: Any) -> bool:
    """Whether a site draws a latent that is no function of other latents."""
    return is_latent(site) and not is_determined(site["fn"])


def innermost(fn: Any) -> Any:
    """The distribution of single elements, inside of ``to_event``, masks, expansions and transforms."""
    # Pyro's and torch's wrappers have no class in common.
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def parameters_of(fn: Any) -> dict[str, Tensor]:
    """The tensors that a distribution of single elements is given by, by name."""
    inner = innermost(fn)
    # One-hot vectors are those of a categorical distribution.
    holder = vars(inner).get("_categorical", inner)
    own = {name: vars(holder).get(name) for name in holder.arg_constraints}
    # Of probabilities and logits one is given, and the other kept once it has been asked for.
    given = vars(holder).get("_param")
    return {name: x for name, x in own.items() if isinstance(x, Tensor) and (given is None or x is given)}


def is_determined(fn: Any) -> bool:
    """Whether the value is a function of other latents: its density is then a Jacobian, which belongs to the path."""
    return isinstance(innermost(fn), Delta)


def with_innermost(fn: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a distribution with another one of its single elements.

    Args:
        fn: the distribution, which is left as it is.
        change: from the distribution of single elements to the other one.
    """
    if not hasattr(fn, "base_dist"):
        return change(fn)
    changed = copy.copy(fn)
    changed.base_dist = with_innermost(fn.base_dist, change)
    return changed


def score_of(site: Any) -> Tensor | None:
    """Zero, with the gradient of the site's log density at a fixed value: the score. ``None`` where there is no path."""
    fn, value = site["fn"], site["value"]
    if not fn.has_rsample or not value.requires_grad or is_determined(fn):
        return None
    log_prob = fn.log_prob(value.detach(), *site["args"], **site["kwargs"])
    score = scale_and_mask(log_prob, site["scale"], site["mask"])
    return score - score.detach()


class WithoutPath(Messenger):
    """Draws every latent without a path from its parameters, so that Pyro takes the score function for its gradient."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_drawn(msg) and msg["value"] is None and msg["fn"].has_rsample:
            # The draws of the path, and those of parameters that are no numbers no error: the loss is none then either.
            with torch.no_grad():
                value = msg["fn"].rsample(*msg["args"], **msg["kwargs"])
            msg["fn"] = with_innermost(msg["fn"], _without_path)
            # A tensor that no transform has in its cache: its inverse is to be differentiated by the parameters.
            msg["value"] = value.clone()


def _without_path(fn: Any) -> Any:
    changed = copy.copy(fn)
    changed.has_rsample = False
    return changed
