"""Draws, means and quantiles of each latent of a call."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avi.errors import check_count
from pyro_avi.factors.means import drawn_means
from pyro_avi.factors.row_factor import RowFactor
from pyro_avi.factors.site_posteriors import DrawnSite, site_posteriors
from pyro_avi.guide_bases.local_posteriors import LocalPosteriors
from pyro_avi.guide_bases.mean_field import MeanFieldNormal

__all__ = ["SiteSummaries"]

_Answer = TypeVar("_Answer")


class SiteSummaries(LocalPosteriors):
    """A guide that gives draws, means, medians and quantiles of every latent, local and global, by site.

    Args:
        model, create_plates: as for :class:`~pyro_avi.guide_bases.plate_guide.PlateGuide`.
    """

    @torch.no_grad()
    def sample(self, *args, num_samples: int, **kwargs) -> dict[str, Tensor]:
        """Independent draws of every latent, by site: ``[S]`` in front of the shape of the site in the model.

        The same as calling the guide ``S`` times, or ``Predictive(guide, num_samples=S)``, in one go: an encoder is run once.
        Each draw is of all latents together, global and local. They are those of the surrounding program's random state.

        Args:
            *args, **kwargs: the arguments of the model. Where it draws its rows itself, the draws are of all ``N``; without
                arguments, constant and factorized guides answer for all rows that they were set up with.
            num_samples: ``S``.

        Returns:
            The draws. Latents that the model enumerates, or that this call observes, are not among them.

        Raises:
            ValueError: if ``num_samples`` is not positive.

        Example::

            >>> import torch
            >>> import pyro_avi as avi
            >>> x = torch.rand(20, 1, 8, 8)
            >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
            >>> guide = avi.AmortizedGuide(model).setup(x)
            >>> guide.sample(torch.rand(7, 1, 8, 8), num_samples=100)["z"].shape
            torch.Size([100, 7, 2])
        """
        check_count("num_samples", num_samples)
        self.setup(*args, **kwargs)

        def draw(count: int) -> dict[str, Tensor]:
            def of_globals(guide: nn.Module, names: Sequence[str]) -> Mapping[str, Tensor]:
                if isinstance(guide, MeanFieldNormal):
                    return guide.sample(*args, num_samples=count, **kwargs)
                return _drawn(guide, args, kwargs, names, count)

            return self._answer(
                args,
                kwargs,
                of_globals,
                lambda row_factor, parameters: row_factor.factor.draw(parameters, count),
                follows_draw=self._draws_globals_first,
            )

        if not self._draws_globals_first:
            return draw(num_samples)
        # Every draw of the global latents has parameters of its own.
        draws = [draw(1) for _ in range(num_samples)]
        return {name: torch.cat([each[name] for each in draws]) for name in draws[0]}

    @torch.no_grad()
    def posterior_by_site(self, *args, **kwargs) -> dict[str, dist.TorchDistribution]:
        """The marginal distribution of each latent by site, in the coordinates of the model and the shape of the site.

        All of them can be sampled. These have a density, ``log_prob``: discrete latents, latents of a family with
        independent coordinates, scalars with normal marginals, and a vector that is the only latent of a row, for any
        family. For other marginals of a joint distribution there is no formula; the joint is :meth:`posterior`.

        Args:
            *args, **kwargs: the arguments of the model, as for :meth:`sample`.

        Example::

            >>> import torch
            >>> import pyro_avi as avi
            >>> x = torch.rand(20, 1, 8, 8)
            >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
            >>> guide = avi.AmortizedGuide(model, family=avi.MultivariateNormal()).setup(x)
            >>> site = guide.posterior_by_site(x[:3])["z"]
            >>> site.sample().shape, site.log_prob(torch.zeros(3, 2)).shape
            (torch.Size([3, 2]), torch.Size([3]))
        """
        self.setup(*args, **kwargs)

        def of_globals(guide: nn.Module, names: Sequence[str]) -> Mapping[str, dist.TorchDistribution]:
            if isinstance(guide, MeanFieldNormal):
                return guide.posterior_by_site(*args, **kwargs)
            draw = partial(_drawn, guide, args, kwargs, names)
            shapes = {name: value.shape[1:] for name, value in draw(1).items()}
            dims = {latent.name: latent.event_dim for latent in self._structure.global_latents}
            return {name: DrawnSite(name, draw, shapes[name], dims[name]) for name in names}

        return self._answer(
            args, kwargs, of_globals, lambda row_factor, parameters: site_posteriors(row_factor.factor, parameters)
        )

    @torch.no_grad()
    def mean(self, *args, **kwargs) -> dict[str, Tensor]:
        r"""The posterior mean of each latent, by site, in the coordinates of the model: of a rate, not of its logarithm.

        Families of normals have those of real latents and of latents bounded from one side in closed form,
        :math:`E[e^u] = e^{m + s^2 / 2}`, and those of latents bounded from both sides by quadrature. All others (flows,
        supports such as the simplex, a ``global_guide`` of your own) are the average of 1,000 draws under a fixed seed, whose
        standard error is 3 % of the latent's standard deviation. A Bernoulli latent has its probability, a one-hot one those
        of its positions; the mean of a Categorical is that of the numbers of its values, which says little where they
        are names. A mean need not lie in the support.

        Args:
            *args, **kwargs: the arguments of the model, as for :meth:`sample`.

        Example::

            >>> import pyro, pyro.distributions as dist, torch
            >>> import pyro_avi as avi
            >>> def model(x):
            ...     with pyro.plate("data", len(x)):
            ...         rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
            ...         pyro.sample("x", dist.Poisson(rate), obs=x)
            >>> x = torch.tensor([0.0, 3.0])
            >>> guide = avi.FactorizedGuide(model, init_scale=1.0).setup(x)
            >>> guide.mean(x)["rate"] / guide.median(x)["rate"]
            tensor([1.6487, 1.6487])
        """
        self.setup(*args, **kwargs)

        def of_globals(guide: nn.Module, names: Sequence[str]) -> Mapping[str, Tensor]:
            if isinstance(guide, MeanFieldNormal):
                return guide.mean(*args, **kwargs)
            return drawn_means(lambda count: _drawn(guide, args, kwargs, names, count), names, 1)

        return self._answer(args, kwargs, of_globals, lambda row_factor, parameters: row_factor.factor.mean(parameters))

    @torch.no_grad()
    def median(self, *args, **kwargs) -> dict[str, Tensor]:
        """The posterior median of each latent, by site.

        Args:
            *args, **kwargs: the arguments of the model. Without them, constant and factorized guides answer for all rows
                that they were set up with.
        """
        self.setup(*args, **kwargs)
        return self._quantiles(0.5, args, kwargs, lambda guide, names: guide.median(*args, **kwargs))

    @torch.no_grad()
    def quantiles(self, quantiles, *args, **kwargs) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, by site, ``quantiles`` leftmost.

        Args:
            quantiles: numbers between 0 and 1.
            *args, **kwargs: the arguments of the model, as for :meth:`median`.
        """
        self.setup(*args, **kwargs)
        return self._quantiles(
            quantiles, args, kwargs, lambda guide, names: guide.quantiles(quantiles, *args, **kwargs)
        )

    def _quantiles(self, quantiles, args: tuple, kwargs: Mapping[str, Any], of_globals) -> dict[str, Tensor]:
        def of_rows(row_factor: RowFactor, parameters: Tensor) -> Mapping[str, Tensor]:
            return row_factor.factor.quantile(parameters, torch.as_tensor(quantiles).to(parameters))

        return self._answer(args, kwargs, of_globals, of_rows)

    def _answer(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        of_globals: Callable[[nn.Module, Sequence[str]], Mapping[str, _Answer]],
        of_rows: Callable[[RowFactor, Tensor], Mapping[str, _Answer]],
        *,
        follows_draw: bool = False,
    ) -> dict[str, _Answer]:
        """An answer for all latents, in the order of the model.

        Args:
            args, kwargs: of the call; without any, the answer may be for all rows.
            of_globals: from the factor of the global latents, and the names of these.
            of_rows: from the factor of a set of rows and their parameters ``[*B, P]``.
            follows_draw: whether the answer of the globals is one draw ``[1, ...]`` that the parameters of the rows follow.
        """
        result: dict[str, Any] = {}
        with poutine.block():
            data = None if args or kwargs else self._all_rows()
            if data is None:
                data, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            names = [name for name in self.global_latents if name not in data.given]
            if names:
                result.update(of_globals(self.global_guide, names))
            if follows_draw:
                data = replace(data, draws={name: result[name].squeeze(0) for name in names})
            for row_factor in self.row_factors:
                result.update(of_rows(row_factor, self._conditioned(row_factor, data, args, kwargs)))
        # Sites that the call observes are not among its latents.
        order = dict.fromkeys([*self._structure.order, *result])
        return {name: result[name] for name in order if name in result and name not in data.given}


def _drawn(
    guide: nn.Module, args: tuple, kwargs: Mapping[str, Any], names: Sequence[str], count: int
) -> dict[str, Tensor]:
    """Draws of some latents ``[count, ...]`` from a guide of any kind."""
    traces = [poutine.trace(guide).get_trace(*args, **kwargs).nodes for _ in range(count)]
    return {name: torch.stack([nodes[name]["value"] for nodes in traces]) for name in names}
