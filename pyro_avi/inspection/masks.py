"""Which elements of a site count: masks around it, on its distribution and inside it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution

__all__ = ["Mask", "site_mask"]


@dataclass(frozen=True)
class Mask:
    """The mask of a site.

    Attributes:
        values: true where the site counts. A tensor broadcasts against the site's batch shape followed by the first
            ``event_dim`` dimensions of its events.
        event_dim: the number of event dimensions that the values tell apart: 0 where they are of whole events.
    """

    values: Tensor | bool
    event_dim: int = 0

    def of_elements(self, event_dim: int) -> Tensor | bool:
        """The values for the elements of a value with so many event dimensions: they broadcast against it."""
        return _append_dims(self.values, event_dim - self.event_dim)

    def inside(self, fn: dist.TorchDistribution) -> dist.TorchDistribution:
        """A distribution ``base.to_event(n)``, of which the elements that the values tell apart count where they are true."""
        apart = fn.base_dist.to_event(fn.reinterpreted_batch_ndims - self.event_dim)
        return apart.mask(self.values).to_event(self.event_dim)


def site_mask(site: Mapping[str, Any]) -> Mask | None:
    """The mask of a site by ``poutine.mask`` around it and ``.mask()`` anywhere in its distribution; ``None`` without one.

    Args:
        site: of a trace.

    Raises:
        ValueError: if there is a mask inside a transformed distribution, a mixture or the like, where it leaves out a part
            of an element's density.
    """
    fn = site["fn"]
    masks = [Mask(site["mask"])] if site["mask"] is not None else []
    masks += _masks_on(fn)
    masks = [mask for mask in masks if mask.values is not True]
    if _has_hidden(fn):
        raise ValueError(
            f"Expected masks of whole elements at site {site['name']!r}, got a mask inside {_inmost(fn)[0]!r}.\n"
            "There it leaves out a part of an element's density only. Put .mask(...) behind it, before any .to_event(...)."
        )
    if not masks:
        return None
    event_dim = max(mask.event_dim for mask in masks)
    values = masks[0].of_elements(event_dim)
    for mask in masks[1:]:
        values = values & mask.of_elements(event_dim)
    return _of_whole_events(values, event_dim)


def _append_dims(values: Tensor | bool, count: int) -> Tensor | bool:
    return values[(..., *[None] * count)] if isinstance(values, Tensor) and count else values


def _of_whole_events(values: Tensor | bool, event_dim: int) -> Mask:
    """A mask without the innermost event dimensions that its values do not vary over, by their shape or strides."""
    if not isinstance(values, Tensor):
        return Mask(values)
    while event_dim and (values.dim() == 0 or values.shape[-1] == 1 or values.stride(-1) == 0):
        values, event_dim = values[..., 0] if values.dim() else values, event_dim - 1
    return Mask(values, event_dim)


def _layers(fn: Distribution) -> Iterator[tuple[Distribution, int]]:
    """The wrappers of a distribution and the innermost one, with the number of event dimensions added around each."""
    event_dim = 0
    yield fn, event_dim
    while isinstance(fn, MaskedDistribution | ExpandedDistribution | torch.distributions.Independent):
        if isinstance(fn, torch.distributions.Independent):
            event_dim += fn.reinterpreted_batch_ndims
        fn = fn.base_dist
        yield fn, event_dim


def _inmost(fn: Distribution) -> tuple[Distribution, int]:
    return list(_layers(fn))[-1]


def _masks_on(fn: Distribution) -> list[Mask]:
    return [Mask(layer._mask, event_dim) for layer, event_dim in _layers(fn) if isinstance(layer, MaskedDistribution)]


def _has_hidden(fn: Distribution) -> bool:
    """Whether a component of the innermost distribution is masked."""
    parts = [part for part in vars(_inmost(fn)[0]).values() if isinstance(part, Distribution)]
    return any(_masks_on(part) or _has_hidden(part) for part in parts)
