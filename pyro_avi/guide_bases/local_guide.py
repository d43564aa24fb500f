"""What the three guides share: everything but the inference function."""

import copy
import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoCallable
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData, CallReader
from pyro_avi.factors.row_factor import RowFactor, RowFactors
from pyro_avi.families import DiagonalNormal, Family
from pyro_avi.guide_bases.description import check_description, describe_latents, qualified_name
from pyro_avi.guide_bases.expected import Expected
from pyro_avi.guide_bases.mean_field import HideSites, MeanFieldNormal, check_has_latents, check_init_scale
from pyro_avi.guide_bases.site_summaries import SiteSummaries
from pyro_avi.inspection.inspect_model import inspect_model
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import row_plate
from pyro_avi.inspection.structure import Structure

__all__ = ["LocalGuide", "check_local_guide"]


class LocalGuide(SiteSummaries):
    r"""A guide with a factor of its own for every row of a plate.

    .. math:: q(\theta, z_{1:N}) = q_0(\theta) \prod_n q(z_n; f(n, x_n))

    Subclasses give the inference function :math:`f`: :class:`~pyro_avi.ConstantGuide`, :class:`~pyro_avi.AmortizedGuide`,
    :class:`~pyro_avi.FactorizedGuide`, and :class:`~pyro_avi.SemiAmortizedGuide`, which goes on from an encoder's output.

    Latents in several of the chosen plates get one factor for every combination of their rows; latents of different plates
    belong to different *row sets*, each with a family and an inference function of its own. A latent's other plates count
    as dimensions of its row. A model without a plate of rows has global latents only, and a warning says so.

    Args:
        model: any Pyro callable.
        plate: the name of the plate whose rows get factors of their own, or several names; by default the one that holds
            both a latent and an observation.
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
        plate: str | Sequence[str] | None = None,
        family: Family | None = None,
        global_guide: nn.Module | Callable[[Callable], nn.Module] | None = None,
        init_loc_fn: Callable = init_to_feasible,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ):
        super().__init__(model, create_plates=create_plates)
        check_init_scale(init_scale)
        names = plate if isinstance(plate, Sequence) and not isinstance(plate, str) else (plate,)
        if plate is not None and not (names and all(isinstance(name, str) for name in names)):
            raise TypeError(f"Expected plate= to be the name of a plate or several names, got {plate!r}.")
        if family is not None and not isinstance(family, Family):
            raise TypeError(f"Expected family= to be a Family such as DiagonalNormal(), got {family!r}.")
        self._plates_asked = None if plate is None else tuple(names)
        # In a tuple, so that the module does not register it: the copies are trained, one for each row set.
        self._given_family = (family or DiagonalNormal(),)
        self._given_global_guide = global_guide
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale
        self._expected: Expected | None = None

    @abstractmethod
    def _create_function(
        self, row_factor: RowFactor, initial: Tensor, data: CallData, args: tuple, kwargs: Mapping[str, Any]
    ) -> nn.Module:
        """The inference function of a set of rows; ``initial [*B, P]`` are to be its values at the rows of the call."""

    def _create_reader(self, structure: Structure) -> CallReader | None:
        """The reader of rows and data for the inference functions; ``None`` if the caller provides both."""
        unobserved = not structure.observations
        return CallReader(self.model, tuple(structure.frames), latents=_names(structure), unobserved=unobserved)

    def _default_plates(self, trace: Trace) -> Sequence[str]:
        """The plates whose rows get factors of their own if the caller named none."""
        plate = row_plate(trace)
        return () if plate is None else (plate,)

    def setup(self, *args, **kwargs) -> "LocalGuide":
        """Inspect the model and create all parameters, unless that has been done; return the guide.

        Args:
            *args, **kwargs: the arguments of the model.

        Raises:
            ValueError: if the model lacks a plate that was asked for, several could be meant, or it has no latent.
        """
        if self._structure is not None:
            return self
        plates = self._default_plates if self._plates_asked is None else self._plates_asked
        structure = inspect_model(self.model, args, kwargs, plates=plates, init_loc_fn=self._init_loc_fn)
        self._check_rows(structure)
        self._structure = structure
        self._depth = max((-frame.dim for frame in self._frames()), default=0)
        try:
            self._reader = self._create_reader(structure)
            with isolated_run():
                mosts = self._expected and self._expected.most_of_families(structure)
                for r, most in zip(structure.row_sets, mosts or itertools.repeat(None), strict=False):
                    self.row_factors.append(RowFactor(r, copy.deepcopy(self._given_family[0]), most=most))
                data, _ = self._find(args, kwargs, self._given_plates(args, kwargs), any_rows=True)
                if self._expected is not None:
                    self._check_expected_rows(self._expected, data)
                for row_factor in self.row_factors:
                    initial = row_factor.factor.initial(self._init_scale)
                    row_factor.factor.to(initial)
                    row_factor.function = self._create_function(row_factor, initial, data, args, kwargs)
                self.global_guide = self._create_global_guide(structure)
                if self.global_guide is not None:
                    self.plates = self._plates(self._frames(), {}, structure.without_size)
                    self.global_guide(*args, **kwargs)
                self._check_call(data, args, kwargs)
                self._check_expected()
                self._take_expected()
        except BaseException:
            # A call that failed leaves no half-made guide behind.
            self._structure = self._reader = self.global_guide = None
            self.row_factors = RowFactors()
            raise
        return self

    @property
    def _is_set_up(self) -> bool:
        return self._structure is not None

    def describe(self) -> dict[str, Any]:
        """The kind of this guide as plain data: everything that its ``state_dict`` does not contain.

        Raises:
            ValueError: if the guide has not been set up.
        """
        self._require_setup()
        structure, given = self._structure, self._given_global_guide
        return {
            "class": type(self).__name__,
            "plate": None if self._plates_asked is None else list(self._plates_asked),
            "family": self.family.describe(),
            "init_scale": self._init_scale,
            "dtype": str(self._like.dtype).removeprefix("torch."),
            "global_guide": None if given is None else qualified_name(self.global_guide),
            **describe_latents(structure),
        }

    def expect(
        self, description: Mapping[str, Any], state: Mapping[str, Tensor], *, family_is_given: bool = True
    ) -> None:
        """Load parameters when the guide is set up, and raise an error if its description differs.

        Sizes that the description declares are compared with those of the parameters before memory is taken for them.

        Args:
            description: what :meth:`describe` said of the guide that the parameters are of.
            state: its ``state_dict``.
            family_is_given: whether the family is the caller's rather than made by the description.
        """
        self._expected = Expected.of(description, state, family_is_given=family_is_given)
        self._expected.held = [held + self._held_elsewhere() for held in self._expected.held]
        self.load_state_dict(state)

    def _held_elsewhere(self) -> int:
        """The numbers that files beside that of the guide hold for it."""
        return 0

    def _check_expected_rows(self, expected: Expected, data: CallData) -> None:
        """Raise an error for inference functions with more numbers than the file of the guide holds for them."""
        for row_factor in self.row_factors:
            expected.check_size(row_factor.row_set.plates, row_factor.factor.num_parameters)

    def _check_call(self, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Raise an error if the inference function does not apply to the model, by the call that the guide is set up with."""

    def _take_expected(self) -> None:
        try:
            self._take_pending()
        except RuntimeError as error:
            if self._expected is None:
                raise
            raise ValueError(
                f"Expected the parameters of the guide that the file describes, got others: {error}"
            ) from error

    def _check_expected(self) -> None:
        if self._expected is not None:
            self.to(getattr(torch, self._expected.description["dtype"]))
            check_description(self.describe(), self._expected.description)

    def _check_rows(self, structure: Structure) -> None:
        for plate in self._plates_asked or ():
            if plate not in structure.frames:
                raise ValueError(f"Expected a latent in plate={plate!r}, found none.")
        if structure.row_sets:
            return
        check_has_latents(structure)
        in_plates = sorted({frame.name for latent in structure.global_latents for frame in latent.frames})
        choice = f" The latents' plates are {in_plates}: choose by plate=..." if in_plates else ""
        why = "has no plate that holds both a latent and an observation"
        if not structure.observations:
            why = "observes nothing in this call (pass it the data that the plate of the rows is recognized by)"
        warnings.warn(
            f"The model {why}: every latent is global, and the guide is that of the globals.{choice}", stacklevel=3
        )

    def _create_global_guide(self, structure: Structure) -> AutoGuide | None:
        given = self._given_global_guide
        if not structure.global_latents:
            if given is not None:
                raise ValueError("Expected global_guide=None for a model without latents outside the plate, got one.")
            return None
        hidden = HideSites(self.model, [latent.name for latent in structure.local_latents])
        if given is None:
            return MeanFieldNormal(hidden, init_loc_fn=self._init_loc_fn, init_scale=self._init_scale)
        guide = given if isinstance(given, nn.Module) else given(hidden)
        return guide if isinstance(guide, AutoGuide) else AutoCallable(hidden, guide)

    # Declared, as torch types the attributes of a module as tensors or modules.
    plates: dict[str, Any]

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every latent of the model; return the values by site."""
        self.setup(*args, **kwargs)
        given = self._given_plates(args, kwargs)
        data, plates = self._find(args, kwargs, given, draw=True)
        self.plates = self._plates(self._frames(), {**given, **plates}, self._structure.without_size)
        result, samplers = {}, {}
        if self._given_global_guide is None and self.global_guide is not None:
            # Its masks and scales were read along with the others.
            samplers.update(self.global_guide.samplers(self.plates, data))
        elif self.global_guide is not None:
            result.update(self.global_guide(*args, **kwargs))
        if self._draws_globals_first:
            first = [name for name in self._structure.order if name in samplers]
            result.update((name, samplers.pop(name)()) for name in first)
            data = replace(data, draws=result)
        for row_factor, parameters in zip(self.row_factors, self._infer_all(data, args, kwargs), strict=True):
            samplers.update(row_factor.factor.samplers(parameters, self.plates, data.masks, data.scales, data.given))
        result.update((name, samplers[name]()) for name in self._structure.order if name in samplers)
        return result

    @property
    def family(self) -> Family:
        """The family of each factor."""
        return self._given_family[0]

    @property
    def _device(self) -> torch.device:
        # Asked at every call, and a walk through all modules takes longer than a draw.
        for row_factor in self.row_factors:
            if row_factor.function is not None:
                return next(row_factor.function.parameters()).device
        return self._like.device

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the guide, which may have been moved since it was set up."""
        first, *_ = self._structure.local_latents + self._structure.global_latents
        own = (tensor for tensor in self.parameters() if tensor.is_floating_point())
        # The values of a discrete latent are whole numbers, its density is not.
        return next(own, first.initial.new_zeros((), dtype=first.dtype))

    def local_parameters(self) -> list[nn.Parameter]:
        """The parameters of the inference functions; all others of the guide belong to the global latents."""
        return list(self.row_factors.parameters())


def check_local_guide(guide: Any) -> None:
    """Raise an error if a guide is not one of this library's, for functions that need more of it than draws."""
    if not isinstance(guide, LocalGuide):
        raise TypeError(
            "Expected a ConstantGuide, AmortizedGuide, SemiAmortizedGuide or FactorizedGuide, got "
            f"{type(guide).__name__}.\n"
            "Of other guides avi.log_weights gives the weights, and avi.iwelbo and avi.khat what these say."
        )


def _names(structure: Structure) -> list[str]:
    return [latent.name for latent in structure.global_latents + structure.local_latents]
