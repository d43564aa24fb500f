"""The distribution of a latent's site, given that of its unconstrained coordinates."""

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.guides.placed import Placed
from pyro_avi.structure import Latent

__all__ = ["on_support", "placed"]


def on_support(latent: Latent, normal: dist.Normal) -> dist.TorchDistribution:
    """A latent's site, sampled from normals of its unconstrained coordinates."""
    # A real site is sampled from its normals themselves, and an elementwise support is transformed by elements, so that
    # closed-form divergences apply.
    if latent.is_real:
        return normal.to_event(latent.unconstrained_event_dim)
    inner = latent.unconstrained_event_dim - latent.independent_dim
    return dist.TransformedDistribution(normal.to_event(inner), [latent.transform]).to_event(latent.independent_dim)


def placed(latent: Latent, coordinates: Tensor) -> Placed:
    """A latent's site, computed from its share of a joint draw of unconstrained coordinates."""
    value = latent.to_support(coordinates)
    if latent.is_real:
        log_density = torch.zeros((), dtype=value.dtype, device=value.device)
    else:
        log_density = -latent.transform.log_abs_det_jacobian(coordinates, value)
        log_density = (
            log_density.sum(tuple(range(-latent.independent_dim, 0))) if latent.independent_dim else log_density
        )
    return Placed(value, log_density.expand(value.shape[: value.dim() - latent.event_dim]), event_dim=latent.event_dim)
