"""A model conditioned on values of its global latents, so that its rows are independent."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_avi.evidence.one_row import as_one_row
from pyro_avi.guide_bases.local_guide import LocalGuide, check_local_guide
from pyro_avi.inspection.isolated_run import isolated_run

__all__ = ["Conditional", "Theta", "hold_globals"]

Theta = str | Mapping[str, Tensor]


class Conditional:
    """A model whose global latents have given values and are no sites any more.

    Args:
        model: any Pyro callable.
        theta: the values by site.
    """

    def __init__(self, model: Callable, theta: Mapping[str, Tensor]):
        self.model, self.theta = model, dict(theta)

    def __call__(self, *args, **kwargs):
        """Run the model."""
        with poutine.block(hide=list(self.theta)), poutine.condition(data=self.theta):
            return self.model(*args, **kwargs)


def hold_globals(
    model: Callable, guide: LocalGuide, theta: Theta, args: tuple, kwargs: Mapping[str, Any], *, seed: int
) -> tuple[Callable, LocalGuide]:
    """The model given the global latents, so that its rows are independent, and a guide for it.

    A model without global latents is returned itself, and one whose latents are all global as one row.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides.
        theta: ``"mean"`` for the mean of the guide's factor in unconstrained coordinates (the median of a normal factor, on
            every support), ``"draw"`` for a draw from the factor, or the values by site.
        args, kwargs: the arguments of both.
        seed: of the draw.

    Raises:
        ValueError: if theta is none of these or lacks a global latent.
        TypeError: if the guide is none of the three.
    """
    check_local_guide(guide)
    guide.setup(*args, **kwargs)
    if not guide.row_plates:
        return as_one_row(model, guide, args, kwargs)
    names = guide.global_latents
    if not names:
        return model, guide
    if isinstance(theta, Mapping):
        if set(theta) != set(names):
            raise ValueError(f"Expected theta= to give the global latents {sorted(names)}, got {sorted(theta)}.")
        return Conditional(model, theta), guide
    if theta not in ("mean", "draw"):
        raise ValueError(f'Expected theta= to be "mean", "draw" or the values by site, got {theta!r}.')
    with isolated_run(seed):
        if theta == "draw":
            nodes = poutine.trace(guide.global_guide).get_trace(*args, **kwargs).nodes
            values = {name: nodes[name]["value"] for name in names}
        else:
            median = _median(guide, args, kwargs)
            values = {name: median[name] for name in names}
    return Conditional(model, {name: torch.as_tensor(value).detach() for name, value in values.items()}), guide


def _median(guide: LocalGuide, args, kwargs) -> Mapping[str, Tensor]:
    try:
        return guide.global_guide.median(*args, **kwargs)
    except NotImplementedError:
        raise ValueError(
            f"Expected a guide of the global latents that knows its median, got {type(guide.global_guide).__name__}.\n"
            'Pass theta="draw", or the values by site: theta={...}.'
        ) from None
