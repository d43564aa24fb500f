"""The variational parameters and local posteriors of the rows of a call."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.factors.row_factor import RowFactor, RowFactors
from pyro_avi.guide_bases.plate_guide import PlateGuide
from pyro_avi.rows.merge import MergedBatches
from pyro_avi.rows.subsample import Subsample
from pyro_avi.seeds import draws_from

__all__ = ["LocalPosteriors"]


class LocalPosteriors(PlateGuide):
    """A guide that gives the variational parameters and posteriors of the rows of a call, and draws or means by batch.

    Args:
        model, create_plates: as for :class:`~pyro_avi.guide_bases.plate_guide.PlateGuide`.
    """

    def __init__(self, model: Callable, *, create_plates: Callable | None = None):
        super().__init__(model, create_plates=create_plates)
        # A guide of the package, one of Pyro's, or the caller's own.
        self.global_guide: Any = None
        self.row_factors = RowFactors()

    @abstractmethod
    def setup(self, *args, **kwargs) -> "LocalPosteriors":
        """Inspect the model and create all parameters, unless that has been done; return the guide."""

    @abstractmethod
    def _infer(self, row_factor: RowFactor, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The variational parameters ``[*B, P]`` of the rows of a call."""

    def _infer_all(self, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The variational parameters ``[*B, P]`` of each set of rows of a call."""
        return [self._infer(row_factor, data, args, kwargs) for row_factor in self.row_factors]

    @property
    def _draws_globals_first(self) -> bool:
        """Whether inference functions read the values of the global latents in the same draw."""
        return False

    def _by_row_set(self, get: Callable[[RowFactor], Any]) -> Any:
        """A value for the only row set, or a dictionary of values by plates for several row sets."""
        self._require_setup()
        if len(self.row_factors) == 1:
            return get(self.row_factors[0])
        return {row_factor.row_set.plates: get(row_factor) for row_factor in self.row_factors}

    def variational_parameters(self, *args, **kwargs) -> Tensor | dict[tuple[str, ...], Tensor]:
        """The output of the inference function for the rows of a call: ``[B, P]``.

        Several plates of one row set have a dimension each; several row sets give a dictionary by the names of their plates,
        and a guide whose latents are all global an empty one.

        Args:
            *args, **kwargs: the arguments of the model. Where it draws its rows itself, the answer is for all ``N``.
        """
        self.setup(*args, **kwargs)
        with poutine.block():
            data, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            parameters = dict(zip(self.row_factors, self._infer_all(data, args, kwargs), strict=True))
            return self._by_row_set(lambda row_factor: parameters[row_factor])

    def posterior(self, *args, **kwargs) -> dist.TorchDistribution | dict[tuple[str, ...], dist.TorchDistribution]:
        """The local factors of the rows of a call: batch shape ``[B]``, event shape ``[K]``, unconstrained coordinates.

        By site and in the model's coordinates:
        :meth:`~pyro_avi.guide_bases.site_summaries.SiteSummaries.posterior_by_site`.

        Discrete latents have factors of their own, which are not among them. Several row sets give a dictionary, and a guide
        whose latents are all global an empty one.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        self.setup(*args, **kwargs)
        with poutine.block():
            data, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            return self._by_row_set(
                lambda row_factor: row_factor.factor.distribution(self._conditioned(row_factor, data, args, kwargs))
            )

    @torch.no_grad()
    def fixed_posterior(
        self, *args, **kwargs
    ) -> dist.TorchDistribution | dict[tuple[str, ...], dist.TorchDistribution]:
        """The local factors as :meth:`posterior` gives them, without a gradient to the parameters of the guide.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        return self.posterior(*args, **kwargs)

    def check_same_latents(self, other: "LocalPosteriors") -> None:
        """Raise an error if another guide has other local latents than this one.

        Args:
            other: a guide that was given for the model of this one.

        Raises:
            ValueError: if a set of rows has other latents.
        """
        needed, given = (
            [sorted(latent.name for latent in each.row_set.latents) for each in guide.row_factors]
            for guide in (self, other)
        )
        if needed != given:
            raise ValueError(
                f"Expected a guide for the latents {needed} of the model's rows, got one for {given}.\n"
                "Pass the model that the guide was made for."
            )

    def _conditioned(self, row_factor: RowFactor, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The variational parameters ``[*B, P]`` of the rows of a call, given the discrete latents that it observes."""
        return row_factor.factor.condition(self._infer(row_factor, data, args, kwargs), data.given)

    @torch.no_grad()
    def posterior_by_row(
        self,
        batches: Iterable[tuple],
        *,
        sites: Sequence[str] | None = None,
        num_samples: int | None = None,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Draws or means of local latents for all batches of a loader, put together by their rows.

        Beyond the answer itself no more is held than one batch needs.

        Args:
            batches: tuples of the model's arguments. Batches that give the positions of their rows fill these rows, until
                every row of the plate has been seen; others follow one another, until they end.
            sites: the latents asked for; by default all local ones.
            num_samples: the number of independent draws, leftmost in the answer; by default the means, those of
                :meth:`~pyro_avi.guide_bases.site_summaries.SiteSummaries.mean`.
            seed: the seed of the draws, with which the program's random state is left as it was; ``None`` to draw from that
                state.
            device: of the result, by default main memory. The batches themselves are computed on the device of the guide.
            progress: whether to show a progress bar, which appears after the first second.

        Returns:
            By site ``shape of the site`` with all ``N`` rows of its plates in the place of the batch's, behind
            ``num_samples``.

        Raises:
            ValueError: if a site is no local latent, or a row of a plate is in no batch.

        Example::

            >>> import torch
            >>> import pyro_avi as avi
            >>> x = torch.rand(20, 1, 8, 8)
            >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
            >>> guide = avi.AmortizedGuide(model).setup(x)
            >>> guide.posterior_by_row(avi.minibatches(x, batch_size=6), num_samples=3)["z"].shape
            torch.Size([3, 20, 2])
        """
        merged: dict[tuple[str, ...], MergedBatches] = {}
        total = len(batches) if isinstance(batches, Sized) else None
        with draws_from(seed), progress_bar(total, unit="batch", progress=progress) as bar:
            for batch in batches:
                # Loaders give lists, or single tensors.
                call = (batch,) if isinstance(batch, Tensor) else tuple(batch)
                self.setup(*call)
                asked = self._sites_by_rows(sites)
                if not merged:
                    for row_factor, names in asked:
                        plates, dims = row_factor.row_set.plates, {n: row_factor.factor.row_dims(n) for n in names}
                        merged[plates] = MergedBatches(plates, dims, device)
                with poutine.block():
                    data, _ = self._find(call, {}, self._given_plates(call, {}))
                    for row_factor, names in asked:
                        values = self._summarize(row_factor, data, call, num_samples)
                        merged[row_factor.row_set.plates].add(data.rows, {name: values[name] for name in names})
                bar.update()
                if all(each.complete for each in merged.values()):
                    break
        if not merged:
            raise ValueError("Expected at least one batch, got none.")
        return {name: value for each in merged.values() for name, value in each.result().items()}

    def _summarize(
        self, row_factor: RowFactor, data: CallData, call: tuple, num_samples: int | None
    ) -> dict[str, Tensor]:
        """Draws or means of the sites of a row set; sites that the call observes have their observed values."""
        parameters = self._conditioned(row_factor, data, call, {})
        values = (
            row_factor.factor.mean(parameters)
            if num_samples is None
            else row_factor.factor.draw(parameters, num_samples)
        )
        values.update((name, given.expand(values[name].shape)) for name, given in data.given.items() if name in values)
        return values

    def _sites_by_rows(self, sites: Sequence[str] | None) -> list[tuple[RowFactor, list[str]]]:
        """The sites asked for, by the set of rows that they belong to."""
        known = [latent.name for latent in self._structure.local_latents]
        asked = known if sites is None else list(sites)
        if not asked or not set(asked) <= set(known):
            raise ValueError(f"Expected sites= among the local latents {known}, got {asked}.")
        by_rows = [
            (row_factor, [latent.name for latent in row_factor.row_set.latents if latent.name in asked])
            for row_factor in self.row_factors
        ]
        return [(row_factor, names) for row_factor, names in by_rows if names]

    def _all_rows(self) -> CallData | None:
        """The data of a call for all rows, if the model needs arguments and there are none; otherwise ``None``."""
        if not _needs_arguments(self.model):
            return None
        sizes = {name: frame.full_size or frame.size for name, frame in self._structure.frames.items()}
        return CallData({name: Subsample(size, None) for name, size in sizes.items()}, {}, {}, {})


def _needs_arguments(model: Callable) -> bool:
    try:
        inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind()
    except TypeError:
        return True
    return False
