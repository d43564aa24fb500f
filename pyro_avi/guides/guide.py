"""What the three guides share: everything but the inference function."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoCallable
from pyro.infer.autoguide.initialization import init_to_feasible
from torch import Tensor, nn

from pyro_avi.families import DiagonalNormal
from pyro_avi.guides.factor import Factor
from pyro_avi.guides.mean_field import MeanFieldNormal, check_init_scale
from pyro_avi.guides.owned import OwnedGuide
from pyro_avi.guides.rows import DrawnRows
from pyro_avi.provenance import Found, Sources
from pyro_avi.structure import Structure, inspect_model, quiet, row_plate

__all__ = ["LocalGuide"]


class _Hide:
    """A model without some of its sites. What ``poutine.block`` makes of a module cannot be pickled."""

    def __init__(self, model: Callable, names: Sequence[str]):
        self.model, self.names = model, names

    def __call__(self, *args, **kwargs):
        with poutine.block(hide=self.names):
            return self.model(*args, **kwargs)


class LocalGuide(OwnedGuide):
    r"""A guide with a factor of its own for every row of a plate.

    .. math:: q(\theta, z_{1:N}) = q_0(\theta) \prod_n q(z_n; f(n, x_n))

    Subclasses are final and give the inference function :math:`f`: :class:`~pyro_avi.ConstantGuide`,
    :class:`~pyro_avi.AmortizedGuide`, :class:`~pyro_avi.FactorizedGuide`.

    Args:
        model: any Pyro callable.
        plate: the name of the plate whose rows get factors of their own; by default the one that holds both a latent and
            an observation.
        family: the set that each factor is taken from; by default :class:`~pyro_avi.DiagonalNormal`.
        global_guide: the factor :math:`q_0` of the latents outside the plate: a Pyro guide that is a module, or a function
            from the model with the local latents hidden to one. By default :class:`~pyro_avi.MeanFieldNormal`.
        init_loc_fn: the latents' initial locations, as in :mod:`pyro.infer.autoguide.initialization`.
        init_scale: the initial standard deviation in unconstrained coordinates.
        create_plates: a function of the model's arguments that returns the plates to use, as in Pyro's automatic guides.
    """

    def __init__(
        self,
        model: Callable,
        *,
        plate: str | None = None,
        family: DiagonalNormal | None = None,
        global_guide: nn.Module | Callable[[Callable], nn.Module] | None = None,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ):
        super().__init__(model, create_plates=create_plates)
        check_init_scale(init_scale)
        if plate is not None and not isinstance(plate, str):
            raise TypeError(f"Expected plate= to be the name of one plate, got {plate!r}.")
        if family is not None and not isinstance(family, DiagonalNormal):
            raise TypeError(f"Expected family= to be a DiagonalNormal, got {family!r}.")
        self.family = family or DiagonalNormal()
        self._plate, self._given_global_guide = plate, global_guide
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale
        self._structure: Structure | None = None
        self._sources: Sources | None = None
        self._factor: Factor | None = None
        self.global_guide: AutoGuide | None = None

    @abstractmethod
    def _create_parameters(self, initial: Tensor, found: Found, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Create the inference function's parameters; ``initial [B, P]`` are to be those of the rows found."""

    @abstractmethod
    def _infer(self, found: Found, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The variational parameters ``[B, P]`` of the rows found."""

    def _sites_read(self, structure: Structure) -> tuple[str, ...]:
        """The observed sites whose values the inference function needs."""
        return ()

    def setup(self, *args, **kwargs) -> "LocalGuide":
        """Look at the model and create all parameters, if that has not been done; return the guide.

        Args:
            *args, **kwargs: the arguments of the model.

        Raises:
            ValueError: if the model has no plate of rows, not the one asked for, or several that could be meant.
        """
        if self._structure is not None:
            return self
        plate = row_plate if self._plate is None else self._plate
        structure = inspect_model(self.model, args, kwargs, plate=plate, init_loc_fn=self._init_loc_fn)
        if not structure.local_latents:
            raise ValueError(
                "Expected a model with a plate that holds both a latent and an observation, found none.\n"
                "Try one of the following fixes:\n"
                "- put the latents and the observations of a row into one `with pyro.plate(name, size):`\n"
                "- pass the observations to this call: the plate is recognized by them\n"
                "- name the plate of the local latents: plate=...\n"
                "- where every latent is shared by all rows, use MeanFieldNormal"
            )
        self._structure = structure
        self._factor = Factor(structure.local_latents, self.family, structure.plate.name)
        self._sources = Sources(self.model, structure.plate.name, self._sites_read(structure))
        try:
            with quiet():
                found, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
                self._create_parameters(self._factor.initial(self._init_scale), found, args, kwargs)
                self.global_guide = self._create_global_guide(structure)
                if self.global_guide is not None:
                    self.plates = self._plates(self._frames(), {})
                    self.global_guide(*args, **kwargs)
        except BaseException:
            # A call that failed leaves no half-made guide behind.
            self._structure = self._factor = self._sources = None
            raise
        return self

    def _create_global_guide(self, structure: Structure) -> AutoGuide | None:
        given = self._given_global_guide
        if not structure.global_latents:
            if given is not None:
                raise ValueError("Expected global_guide=None for a model without latents outside the plate, got one.")
            return None
        hidden = _Hide(self.model, [latent.name for latent in structure.local_latents])
        if given is None:
            return MeanFieldNormal(hidden, init_loc_fn=self._init_loc_fn, init_scale=self._init_scale)
        guide = given if isinstance(given, nn.Module) else given(hidden)
        return guide if isinstance(guide, AutoGuide) else AutoCallable(hidden, guide)

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every latent of the model, global ones first; return the values by site."""
        self.setup(*args, **kwargs)
        given = self._given_plates(args, kwargs)
        found, plate = self._find(args, kwargs, given, draw=True)
        self.plates = self._plates(self._frames(), {plate.name: plate, **given})
        result = {} if self.global_guide is None else dict(self.global_guide(*args, **kwargs))
        result.update(self._factor.sample(self._infer(found, args, kwargs), self.plates))
        return result

    def _frames(self):
        structure = self._structure
        return [frame for latent in structure.global_latents + structure.local_latents for frame in latent.frames]

    def _find(
        self, args: tuple, kwargs: Mapping[str, Any], given: Mapping[str, pyro.plate], *, draw: bool = False
    ) -> tuple[Found, pyro.plate]:
        """The rows of a call and the plate to put them in; where the model draws its rows, draw them or take all."""
        frame = self._structure.plate
        drawn = self._sources.draws_rows(args, kwargs)
        rows = None
        if frame.name in given:
            rows = given[frame.name].indices
        elif drawn is not None:
            rows = torch.arange(drawn[0], device=self._device)
            if draw:
                depth = max(-frame.dim for frame in self._frames())
                fn = DrawnRows(*drawn, depth, self._device)
                rows = pyro.sample(frame.name, fn, infer={"is_auxiliary": True})
        found = self._sources.read(args, kwargs, rows)
        if frame.name in given:
            self._check_given(given[frame.name], found, drawn)
            return found, given[frame.name]
        # The rows are settled; a statement of the plate's name would stand in the trace a second time.
        with poutine.block(hide=[frame.name] if drawn else []):
            return found, pyro.plate(frame.name, found.size, subsample=found.index, dim=frame.dim)

    def _check_given(self, plate: pyro.plate, found: Found, drawn) -> None:
        expected = torch.arange(found.size) if found.index is None else found.index
        if drawn is None and not torch.equal(plate.indices.cpu(), expected.cpu()):
            raise ValueError(
                f"Expected plate {plate.name!r} to hold the {len(expected)} rows that the model works on, got "
                f"{len(plate.indices)} others.\nPass create_plates= a function that returns pyro.plate({plate.name!r}, "
                "size, subsample=...) with the rows of the call."
            )

    @property
    def row_plate(self) -> str:
        """The name of the plate whose rows have factors of their own."""
        self._require_setup()
        return self._structure.plate.name

    def _require_setup(self):
        if self._structure is None:
            raise ValueError(
                f"Expected a {type(self).__name__} with parameters, got one that has never seen the model's arguments.\n"
                "Call guide.setup(*args) with the arguments of the model first."
            )

    @property
    def _device(self) -> torch.device:
        return self._like.device

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the guide, which may have been moved since it was set up."""
        return next(iter(self.local_parameters()), self._structure.local_latents[0].initial)

    def local_parameters(self) -> list[nn.Parameter]:
        """The parameters of the inference function; all others of the guide belong to the global latents."""
        of_globals = set() if self.global_guide is None else set(map(id, self.global_guide.parameters()))
        return [parameter for parameter in self.parameters() if id(parameter) not in of_globals]

    def variational_parameters(self, *args, **kwargs) -> Tensor:
        """What the inference function gives for the rows of a call: ``[B, P]``.

        Args:
            *args, **kwargs: the arguments of the model. Where it draws its rows itself, the answer is for all ``N``.
        """
        self.setup(*args, **kwargs)
        with poutine.block():
            found, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            return self._infer(found, args, kwargs)

    def posterior(self, *args, **kwargs) -> dist.TorchDistribution:
        """The local factors of the rows of a call: batch shape ``[B]``, event shape ``[K]``, unconstrained coordinates.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        return self.family.distribution(self.variational_parameters(*args, **kwargs))

    @torch.no_grad()
    def median(self, *args, **kwargs) -> dict[str, Tensor]:
        """The posterior median of each latent, by site.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        parameters = self.variational_parameters(*args, **kwargs)
        of_globals = {} if self.global_guide is None else self.global_guide.median(*args, **kwargs)
        return {**of_globals, **self._factor.quantile(parameters, parameters.new_tensor(0.5))}

    @torch.no_grad()
    def quantiles(self, quantiles, *args, **kwargs) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, by site, ``quantiles`` leftmost.

        Args:
            quantiles: numbers between 0 and 1.
            *args, **kwargs: the arguments of the model.
        """
        parameters = self.variational_parameters(*args, **kwargs)
        of_globals = {} if self.global_guide is None else self.global_guide.quantiles(quantiles, *args, **kwargs)
        return {**of_globals, **self._factor.quantile(parameters, torch.as_tensor(quantiles).to(parameters))}
