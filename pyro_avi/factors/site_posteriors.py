"""The distributions of the sites of a factor, in the coordinates of the model."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_avi.factors.discrete import DiscreteFactor
from pyro_avi.factors.factor import Factor
from pyro_avi.factors.layout import Layout
from pyro_avi.factors.site_distributions import site_from_normals
from pyro_avi.inspection.structure import Latent

__all__ = ["DrawnSite", "site_posteriors"]


class DrawnSite(dist.TorchDistribution):
    """The marginal distribution of a site in a joint one, which can be sampled and has no density.

    Args:
        name: of the site.
        draw: from a number of draws to the draws of all sites, ``[count, ...]`` each.
        shape: of one draw.
        event_dim: the number of its event dimensions.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, draw: Callable[[int], Mapping[str, Tensor]], shape: torch.Size, event_dim: int):
        self._name, self._draw = name, draw
        split = len(shape) - event_dim
        super().__init__(shape[:split], shape[split:], validate_args=False)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``sample_shape + shape`` of the site.

        Args:
            sample_shape: of independent draws.
        """
        draws = self._draw(prod(sample_shape))[self._name]
        return draws.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise an error: the density has no formula.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"The posterior of site {self._name!r} is a marginal of a joint one, whose density has no formula.\n"
            "Take the joint density of the unconstrained coordinates of a row: guide.posterior(*args).log_prob(...)."
        )


def site_posteriors(factor: Factor, parameters: Tensor) -> dict[str, dist.TorchDistribution]:
    """The marginal distribution of each site, with its density if that has a formula; without a gradient to the parameters.

    Args:
        factor: of the sites.
        parameters: ``[*B, P]``, one row for each row of the plates.
    """
    # Parts of a parameter count as parts of a leaf even under no_grad, so that locations alone would have a gradient.
    parameters = parameters.detach()
    layouts = {latent.name: Layout(latent, factor.frames) for latent in factor.latents}
    discrete = [
        DiscreteFactor(latent, layouts[latent.name]) for latent in factor.latents if latent.num_values is not None
    ]
    sizes = [site.num_parameters for site in discrete]
    of_family, *of_discrete = parameters.split([parameters.shape[-1] - sum(sizes), *sizes], -1)
    result: dict[str, dist.TorchDistribution] = {
        site.latent.name: site.distribution(x) for site, x in zip(discrete, of_discrete, strict=True)
    }
    continuous = [latent for latent in factor.latents if latent.num_values is None]
    known = {}
    if continuous and not (discrete and factor.family.conditional):
        known = _with_formula(factor, continuous, layouts, of_family)
    draw = partial(factor.draw, parameters)
    for latent in continuous:
        layout = layouts[latent.name]
        shape = latent.to_support(layout.from_rows(parameters[..., : layout.size])).shape
        result[latent.name] = known.get(latent.name) or DrawnSite(latent.name, draw, shape, latent.event_dim)
    return {latent.name: result[latent.name] for latent in factor.latents}


def _with_formula(
    factor: Factor, continuous: list[Latent], layouts: Mapping[str, Layout], parameters: Tensor
) -> dict[str, dist.TorchDistribution]:
    """The sites whose density has a formula: of independent coordinates, of a single one, or a vector that is a whole row."""
    normals, result = factor.family.marginals(parameters), {}
    first = 0
    for latent in continuous:
        layout = layouts[latent.name]
        columns = slice(first, first + layout.size)
        first += layout.size
        if normals is not None and (factor.family.independent or layout.size == 1):
            loc, scale = (layout.from_rows(each[..., columns]) for each in (normals.loc, normals.scale))
            result[latent.name] = site_from_normals(latent, dist.Normal(loc, scale))
        elif len(continuous) == 1 and layout.is_rows:
            joint = factor.family.distribution(parameters)
            result[latent.name] = joint if latent.is_real else dist.TransformedDistribution(joint, [latent.transform])
    return result
