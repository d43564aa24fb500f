"""The distribution of a latent's site, given that of its unconstrained coordinates."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.factors.transformed_delta import TransformedDelta
from pyro_avi.inspection.masks import Mask
from pyro_avi.inspection.structure import Latent

__all__ = ["site_from_normals", "site_from_draw"]


def site_from_normals(latent: Latent, normal: dist.Normal) -> dist.TorchDistribution:
    """A latent's site, sampled from normals of its unconstrained coordinates."""
    # A real site is sampled from its normals themselves, and an elementwise support is transformed by elements, so that
    # closed-form divergences apply.
    if latent.is_real:
        return normal.to_event(latent.unconstrained_event_dim)
    inner = latent.unconstrained_event_dim - latent.independent_dim
    return dist.TransformedDistribution(normal.to_event(inner), [latent.transform]).to_event(latent.independent_dim)


def site_from_draw(latent: Latent, coordinates: Tensor, mask: Mask | None = None) -> TransformedDelta:
    """A latent's site, computed from its share of a joint draw of unconstrained coordinates.

    Args:
        latent: the latent.
        coordinates: its share, in the shape of the site.
        mask: what masks the site; elements of events that it leaves out have no part in the density.
    """
    value = latent.to_support(coordinates)
    if latent.is_real:
        log_density = torch.zeros((), dtype=value.dtype, device=value.device)
    else:
        log_density = -latent.transform.log_abs_det_jacobian(coordinates, value)
        if mask is not None and mask.event_dim:
            log_density = torch.where(torch.as_tensor(mask.of_elements(latent.independent_dim)), log_density, 0.0)
        if latent.independent_dim:
            log_density = log_density.sum(tuple(range(-latent.independent_dim, 0)))
    return TransformedDelta(
        value, log_density.expand(value.shape[: value.dim() - latent.event_dim]), event_dim=latent.event_dim
    )
