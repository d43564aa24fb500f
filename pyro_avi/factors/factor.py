"""The factor of a set of latents: where variational parameters become sampled sites."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_avi.factors.layout import spread
from pyro_avi.factors.means import drawn_means, mean_on_support
from pyro_avi.factors.parameters import ParameterizedFactor
from pyro_avi.factors.row_masks import common_to_rows, coordinate_mask, enter_mask_and_scale
from pyro_avi.factors.site_distributions import site_from_draw, site_from_normals
from pyro_avi.factors.transformed_delta import TransformedDelta
from pyro_avi.families.family import drawn_quantile
from pyro_avi.inspection.masks import Mask
from pyro_avi.inspection.structure import Latent

__all__ = ["Factor"]


class Factor(ParameterizedFactor):
    r"""Samples latents, site by site and inside their plates, from variational parameters.

    The continuous latents of one row are one vector of ``K`` unconstrained coordinates, in the order of the model's sites,
    with a distribution of the family. A discrete latent has a categorical factor of its own, and one parameter for each of
    its values. Plates of a latent other than the rows' are event dimensions of that row.

    .. math:: q(y_n, z_n) = q(y_n) \, q(z_n), \qquad \text{or} \quad q(y_n) \, q(z_n; \lambda_{n y_n})

    with a conditional family, which has a member of its own for each of the ``C`` values of a row's discrete latents.

    Args:
        name, latents, frames, family: as for :class:`~pyro_avi.factors.parameters.ParameterizedFactor`.
    """

    def samplers(
        self,
        parameters: Tensor,
        plates: Mapping[str, pyro.plate],
        masks: Mapping[str, Mask],
        scales: Mapping[str, Tensor | float],
        given: Mapping[str, Tensor],
    ) -> dict[str, Callable[[], Tensor]]:
        """By site a function that samples it, to be called in the order of the model.

        What others depend on is sampled at once: joint families, and the discrete latents of conditional ones.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
            plates: the plates of the sites, by name.
            masks: what masks the model's sites, by site; those of single elements of an event leave out the same
                coordinates here.
            scales: the factor by which the model's sites count beyond their plates, by site.
            given: the values of latents that the call observes, by site: they are not sampled.
        """

        def sample(latent: Latent, fn: dist.TorchDistribution) -> Tensor:
            mask = masks.get(latent.name)
            if mask is not None and mask.event_dim:
                # The distribution of a joint draw has left these elements out already.
                fn = fn if isinstance(fn, TransformedDelta) else mask.inside(fn)
                mask = None
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame.name])
                enter_mask_and_scale(stack, mask, scales.get(latent.name))
                return pyro.sample(latent.name, fn)

        of_family, *of_discrete = parameters.split(self._split, -1) if self._discrete else [parameters]
        sites: dict[str, Callable[[], Tensor]] = {
            factor.latent.name: partial(sample, factor.latent, factor.distribution(x))
            for factor, x in zip(self._discrete, of_discrete, strict=True)
            if factor.latent.name not in given
        }
        observed = [latent.name for latent in self._continuous if latent.name in given]
        if len(observed) == len(self._continuous):
            return sites
        is_spread = self._members is not None
        if self._members is not None:
            values = {name: sampler() for name, sampler in sites.items()}
            sites.update((name, partial(values.__getitem__, name)) for name in values)
            depth = max(-frame.dim for frame in self.frames)
            of_family = self._members.at(spread(of_family, self.frames, depth), {**given, **values})
        if self.family.independent:
            normals = self.family.coordinates(of_family)
            fns = [
                (latent, site_from_normals(latent, x))
                for latent, x in self._normals_by_site(normals, is_spread=is_spread)
            ]
        else:
            self._check_whole(observed)
            joint = self._sample_joint(of_family, plates, masks, scales, is_spread=is_spread).split(self._sizes, -1)
            fns = [
                (latent, site_from_draw(latent, self._layouts[latent.name].from_spread(x), masks.get(latent.name)))
                for latent, x in zip(self._continuous, joint, strict=True)
            ]
        return sites | {latent.name: partial(sample, latent, fn) for latent, fn in fns if latent.name not in given}

    def _check_whole(self, observed: Sequence[str]) -> None:
        if observed:
            raise ValueError(
                f"Expected a call that observes all of the latents {[latent.name for latent in self._continuous]} or none with "
                f"the joint family {type(self.family).__name__}, got values of {observed}.\n"
                "A joint factor has no density of the others given some. Use family=DiagonalNormal()."
            )

    def _sample_joint(self, parameters, plates, masks, scales, *, is_spread: bool) -> Tensor:
        """One draw of all continuous latents of every row, at an auxiliary site."""
        depth = max(-frame.dim for frame in self.frames)
        parameters = parameters if is_spread else spread(parameters, self.frames, depth)
        fn, names = self.family.distribution(parameters), [latent.name for latent in self._continuous]
        mask = None
        if self.family.sequential and any(name in masks for name in names):
            sizes = parameters.shape[:-1][-depth:]
            fn = fn.mask_elements(coordinate_mask(masks, self._continuous, self._layouts, self.frames, sizes))
        else:
            mask = common_to_rows(masks, "mask", names, self.frames, self.family)
        scale = common_to_rows(scales, "scale", names, self.frames, self.family)
        with ExitStack() as stack:
            for frame in self.frames:
                stack.enter_context(plates[frame.name])
            enter_mask_and_scale(stack, mask, scale)
            return pyro.sample(self.name, fn, infer={"is_auxiliary": True})

    def at(self, coordinates: Tensor) -> dict[str, Tensor]:
        """The values at given coordinates of the sites that :meth:`samplers` sample from a distribution.

        Those of the latents, or that of the auxiliary site of a joint family, from which these follow.

        Args:
            coordinates: ``[*B, K]`` of the continuous latents, one row for each row of the plates.
        """
        if self.family.independent:
            return self._on_sites(coordinates)
        return {self.name: spread(coordinates, self.frames, max(-frame.dim for frame in self.frames))}

    def draw(self, parameters: Tensor, count: int) -> dict[str, Tensor]:
        """Independent draws ``(count,) + shape of the site`` of every site, without sample statements.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
            count: the number of draws.
        """
        of_family, *of_discrete = parameters.split(self._split, -1)
        result = {
            factor.latent.name: factor.distribution(x).sample((count,))
            for factor, x in zip(self._discrete, of_discrete, strict=True)
        }
        if self._members is not None:
            depth = max(-frame.dim for frame in self.frames)
            members = self._members.at(spread(of_family, self.frames, depth), result)
            of_family = members.reshape(count, *parameters.shape[:-1], -1)
        if self._continuous:
            fn = self.family.distribution(of_family)
            result |= self._on_sites(fn.sample(() if self._members is not None else (count,)))
        return {latent.name: result[latent.name] for latent in self.latents}

    def mean(self, parameters: Tensor) -> dict[str, Tensor]:
        """The mean of every site, by a formula if there is one, otherwise the average of 1,000 draws under a fixed seed.

        Args:
            parameters: ``[*B, P]``, one row for each row of the plates.
        """
        of_family, *of_discrete = parameters.split(self._split, -1)
        result = {factor.latent.name: factor.mean(x) for factor, x in zip(self._discrete, of_discrete, strict=True)}
        result |= self._known_means(of_family, of_discrete) if self._continuous else {}
        drawn = [latent.name for latent in self._continuous if latent.name not in result]
        if drawn:
            result |= drawn_means(partial(self.draw, parameters), drawn, parameters.numel())
        return {latent.name: result[latent.name] for latent in self.latents}

    def _known_means(self, of_family: Tensor, of_discrete: Sequence[Tensor]) -> dict[str, Tensor]:
        """The means of those continuous sites that have a formula, over all members of a row."""
        if self._members is None:
            members, shares = of_family.unsqueeze(0), of_family.new_ones(1, *of_family.shape[:-1])
        else:
            members, shares = self._members.components(of_family, of_discrete)
        normals, result = self.family.marginals(members), {}
        for latent, normal in () if normals is None else self._normals_by_site(normals, is_spread=False):
            means = mean_on_support(latent, normal.loc, normal.scale)
            if means is not None:
                layout = self._layouts[latent.name]
                weights = layout.from_rows(shares.unsqueeze(-1).expand(*shares.shape, layout.size))
                result[latent.name] = (weights * means).sum(0)
        return result

    def quantile(self, parameters: Tensor, q: Tensor) -> dict[str, Tensor]:
        """The ``q``-quantiles of every coordinate, mapped to the supports: ``q.shape + shape of the site``."""
        of_family, *of_discrete = parameters.split(self._split, -1)
        result = {
            factor.latent.name: factor.quantile(x, q) for factor, x in zip(self._discrete, of_discrete, strict=True)
        }
        if self._members is not None:
            result |= self._on_sites(drawn_quantile(self.distribution, parameters, q))
        elif self._continuous:
            result |= self._on_sites(self.family.quantile(of_family, q))
        return {latent.name: result[latent.name] for latent in self.latents}
