"""The factor of a set of latents: where a vector of variational parameters becomes sampled sites."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_avi.families import DiagonalNormal
from pyro_avi.structure import Latent

__all__ = ["Factor"]


class Factor:
    """Samples latents, site by site and inside their plates, from parameters of a family.

    The latents of one row are one vector of ``K`` unconstrained coordinates, in the order of the model's sites.
    Plates of a latent other than the rows' are event dimensions of that row.

    Args:
        latents: the latents of the factor.
        family: the set that a row's factor is taken from.
        plate: the name of the plate of the rows; ``None`` for a factor without rows.
    """

    def __init__(self, latents: Sequence[Latent], family: DiagonalNormal, plate: str | None):
        self.latents, self.family, self.plate = tuple(latents), family, plate
        self._layouts = [_Layout(latent, plate) for latent in latents]
        self._sizes = [prod(layout.shape) for layout in self._layouts]
        self.num_parameters = family.num_parameters(sum(self._sizes))

    def initial(self, scale: float) -> Tensor:
        """Parameters ``[B, P]`` (``[P]`` without rows) at the latents' initial values with standard deviation ``scale``."""
        rows = [layout.to_rows(latent.initial) for layout, latent in zip(self._layouts, self.latents, strict=True)]
        return self.family.initial(torch.cat(rows, -1), scale)

    def sample(self, parameters: Tensor, plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
        """Run the sample statements.

        Args:
            parameters: ``[B, P]``, one row for each row of the plate; ``[P]`` without rows.
            plates: the plates of the sites, by name.
        """
        result = {}
        for latent, normal in self._normals(parameters):
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame.name])
                # A real site is sampled from its normal itself, so that closed-form divergences apply.
                fn = normal if latent.is_real else dist.TransformedDistribution(normal, [biject_to(latent.support)])
                result[latent.name] = pyro.sample(latent.name, fn)
        return result

    def quantile(self, parameters: Tensor, q: Tensor) -> dict[str, Tensor]:
        """The ``q``-quantiles of every coordinate, mapped to the supports: ``q.shape + shape of the site``."""
        result = {}
        for latent, normal in self._normals(parameters):
            base = normal.base_dist if isinstance(normal, dist.Independent) else normal
            result[latent.name] = latent.to_support(base.icdf(q.reshape(q.shape + (1,) * len(base.batch_shape))))
        return result

    def _normals(self, parameters: Tensor):
        normal = self.family.coordinates(parameters)
        locs, scales = (x.split(self._sizes, -1) for x in (normal.loc, normal.scale))
        for latent, layout, loc, scale in zip(self.latents, self._layouts, locs, scales, strict=True):
            yield latent, dist.Normal(layout.from_rows(loc), layout.from_rows(scale)).to_event(layout.event_dim)


class _Layout:
    """How a latent's tensor, batch and event dimensions, lies in the rows ``[B, K]``."""

    def __init__(self, latent: Latent, plate: str | None):
        self.event_dim = latent.unconstrained_event_dim
        shape = list(latent.initial.shape)
        self._row = None
        for frame in latent.frames:
            if frame.name == plate:
                self._row = len(shape) - self.event_dim + frame.dim
                del shape[self._row]
        self.shape = tuple(shape)

    def to_rows(self, value: Tensor) -> Tensor:
        return (
            value.reshape(-1) if self._row is None else value.movedim(self._row, 0).reshape(value.shape[self._row], -1)
        )

    def from_rows(self, rows: Tensor) -> Tensor:
        value = rows.reshape(rows.shape[:-1] + self.shape)
        return value if self._row is None else value.movedim(0, self._row)
