"""The values of the global latents as an input of inference functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_avi.calls.call_reader import CallData
from pyro_avi.guide_bases.mean_field import MeanFieldNormal
from pyro_avi.inspection.structure import Structure

__all__ = ["global_values", "globals_by_site", "initial_globals"]


def initial_globals(structure: Structure) -> Tensor | None:
    """``[G]`` the initial values of all global latents, one after another; ``None`` where there are none.

    Args:
        structure: of the model.
    """
    return _joined([latent.to_support(latent.initial) for latent in structure.global_latents])


def global_values(
    structure: Structure, global_guide: Any, data: CallData, args: tuple, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """``[G]`` the values of all global latents in a call: those drawn or observed in it, and the medians of the others.

    Args:
        structure: of the model.
        global_guide: the factor of the global latents, whose parameters the medians follow.
        data: of the call.
        args, kwargs: the arguments of the model.
    """
    return _joined(list(globals_by_site(structure, global_guide, data, args, kwargs).values()))


def globals_by_site(
    structure: Structure, global_guide: Any, data: CallData, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The values of all global latents in a call, by site; arguments as for :func:`global_values`."""
    names = [latent.name for latent in structure.global_latents]
    known = {**data.given, **data.draws}
    if all(name in known for name in names):
        return {name: known[name] for name in names}
    is_own = isinstance(global_guide, MeanFieldNormal)
    medians = global_guide.medians() if is_own else global_guide.median(*args, **kwargs)
    return {name: {**medians, **known}[name] for name in names}


def _joined(values: list[Tensor]) -> Tensor | None:
    return torch.cat([value.flatten() for value in values]) if values else None
