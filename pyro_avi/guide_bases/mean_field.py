"""The factor of the global latents."""

from collections.abc import Callable, Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.errors import check_count
from pyro_avi.factors.factor import Factor
from pyro_avi.factors.site_posteriors import site_posteriors
from pyro_avi.guide_bases.base import BaseGuide
from pyro_avi.inspection.inspect_model import inspect_model
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.structure import Structure

__all__ = ["HideSites", "MeanFieldNormal"]


class HideSites:
    """A model with some of its sites hidden. Unlike the result of ``poutine.block`` it can be pickled."""

    def __init__(self, model: Callable, names: Sequence[str]):
        self.model, self.names = model, names

    def __call__(self, *args, **kwargs):
        with poutine.block(hide=self.names):
            return self.model(*args, **kwargs)


class MeanFieldNormal(BaseGuide):
    r"""Independent normals for every latent of a model: the default factor of the global latents.

    .. math:: q_0(\theta) = \prod_k N(\theta_k; m_k, s_k^2)

    in unconstrained coordinates. Each site is sampled directly, so that closed-form divergences apply to real sites and
    every ELBO of Pyro is right on constrained ones (with :class:`~pyro.infer.autoguide.AutoNormal` and its auxiliary
    sites, ``TraceMeanField_ELBO`` is not). All sites share one parameter vector, which keeps the optimizer cheap.

    Args:
        model: any Pyro callable; where locals are to be left out, a model that hides them.
        init_loc_fn: the initial locations, as in :mod:`pyro.infer.autoguide.initialization`.
        init_scale: the initial standard deviation in unconstrained coordinates.

    Raises:
        ValueError: if ``init_scale`` is not positive, or a latent sits in a subsampled plate.

    Example::

        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_avi as avi
        >>> def model():
        ...     return pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> guide = avi.MeanFieldNormal(model, init_scale=0.1)
        >>> guide()["theta"].shape
        torch.Size([3])
    """

    def __init__(self, model: Callable, *, init_loc_fn: Callable = init_to_feasible, init_scale: float = 0.1):
        super().__init__(model)
        check_init_scale(init_scale)
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale
        # Set by setup(), which every other method calls first.
        self._factor: Factor = None  # type: ignore[assignment]
        self._without_size: frozenset[str] = frozenset()
        self._reader: CallReader = None  # type: ignore[assignment]

    vector: nn.Parameter

    def setup(self, *args, **kwargs) -> "MeanFieldNormal":
        """Inspect the model and create the parameters, unless that has been done; return the guide."""
        if self._factor is not None:
            return self
        structure = inspect_model(self.model, args, kwargs, plates=(), init_loc_fn=self._init_loc_fn)
        check_has_latents(structure)
        for latent in structure.global_latents:
            for frame in latent.frames:
                if frame.full_size not in (None, frame.size):
                    raise ValueError(
                        f"Expected global latent {latent.name!r} in plates of a fixed size, got plate {frame.name!r} with "
                        f"{frame.size} of {frame.full_size} rows.\nA latent with one value a row belongs to plate="
                        f"{frame.name!r} of an amortized, factorized or constant guide."
                    )
        factor = Factor("", structure.global_latents, ())
        with isolated_run():
            self.vector = nn.Parameter(factor.initial(self._init_scale))
        self._factor, self._without_size = factor, structure.without_size
        self._reader = CallReader(self.model, (), latents=[latent.name for latent in factor.latents])
        try:
            self._take_pending()
        except BaseException:
            self._factor = self._reader = None
            del self.vector
            raise
        return self

    @property
    def _is_set_up(self) -> bool:
        return self._factor is not None

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every latent; return the values by site."""
        self.setup(*args, **kwargs)
        frames = [frame for latent in self._factor.latents for frame in latent.frames]
        plates = self._plates(frames, self._given_plates(args, kwargs), self._without_size)
        samplers = self.samplers(plates, self._reader.read(args, kwargs))
        return {latent.name: samplers[latent.name]() for latent in self._factor.latents if latent.name in samplers}

    def samplers(self, plates: Mapping[str, pyro.plate], data: CallData) -> dict[str, Callable[[], Tensor]]:
        """By site a function that samples it, to be called in the order of the model.

        Args:
            plates: the plates of the latents, by name.
            data: what masks and scales the latents in the call, and which of them it observes.
        """
        self.plates = dict(plates)
        return self._factor.samplers(self.vector, plates, data.masks, data.scales, data.given)

    @torch.no_grad()
    def sample(self, *args, num_samples: int, **kwargs) -> dict[str, Tensor]:
        """Independent draws of every latent: ``[S]`` in front of the shape of the site in the model.

        Args:
            *args, **kwargs: the arguments of the model.
            num_samples: ``S``.

        Raises:
            ValueError: if ``num_samples`` is not positive.
        """
        check_count("num_samples", num_samples)
        self.setup(*args, **kwargs)
        return self._factor.draw(self.vector, num_samples)

    @torch.no_grad()
    def posterior_by_site(self, *args, **kwargs) -> dict[str, dist.TorchDistribution]:
        """The distribution of each latent in the model's own coordinates, as that of every guide."""
        self.setup(*args, **kwargs)
        return site_posteriors(self._factor, self.vector)

    @torch.no_grad()
    def mean(self, *args, **kwargs) -> dict[str, Tensor]:
        """The posterior mean of each latent in the model's own coordinates, as that of every guide."""
        self.setup(*args, **kwargs)
        return self._factor.mean(self.vector)

    def medians(self) -> dict[str, Tensor]:
        """The posterior median of each latent as a function of the parameters, with a gradient to them."""
        return self._factor.quantile(self.vector, self.vector.new_tensor(0.5))

    @torch.no_grad()
    def median(self, *args, **kwargs) -> dict[str, Tensor]:
        """The posterior median of each latent."""
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles, *args, **kwargs) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, ``quantiles`` leftmost."""
        self.setup(*args, **kwargs)
        return self._factor.quantile(self.vector, torch.as_tensor(quantiles).to(self.vector))


def check_has_latents(structure: Structure) -> None:
    """Raise an error if a model has no latents."""
    if not structure.order:
        raise ValueError(
            "Expected a model with a latent, found none: there is nothing to infer.\n"
            "Give what is to be inferred a sample statement, and leave its value out of this call."
        )


def check_init_scale(init_scale: float) -> None:
    """Raise an error if an initial standard deviation is not positive."""
    if not init_scale > 0:
        raise ValueError(f"Expected init_scale > 0, got {init_scale}.")
