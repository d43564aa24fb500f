"""What the three guides share: everything but the inference function."""

import copy
import inspect
import itertools
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.guides import AutoCallable
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_avi.families import DiagonalNormal, Family
from pyro_avi.guides.factor import Factor
from pyro_avi.guides.mean_field import MeanFieldNormal, check_init_scale, check_latents
from pyro_avi.guides.merge import Merged
from pyro_avi.guides.owned import OwnedGuide
from pyro_avi.guides.rows import DrawnRows
from pyro_avi.positions import Rows, check_positions
from pyro_avi.provenance import Found, Sources
from pyro_avi.structure import RowSet, Structure, inspect_model, quiet, row_plate

__all__ = ["LocalGuide", "RowFactor", "qualified_name"]


class _Hide:
    """A model without some of its sites. What ``poutine.block`` makes of a module cannot be pickled."""

    def __init__(self, model: Callable, names: Sequence[str]):
        self.model, self.names = model, names

    def __call__(self, *args, **kwargs):
        with poutine.block(hide=self.names):
            return self.model(*args, **kwargs)


class RowFactor(nn.Module):
    """The factor of one set of rows and the inference function that gives its parameters.

    Attributes:
        rows: the rows and their latents.
        factor: what samples the latents from parameters ``[*B, P]``.
        function: the inference function.
    """

    def __init__(self, rows: RowSet, family: Family):
        super().__init__()
        self.rows = rows
        self.factor = Factor(f"_{'_'.join(rows.plates)}_latents", rows.latents, rows.frames, family)
        self.function: nn.Module | None = None


class LocalGuide(OwnedGuide):
    r"""A guide with a factor of its own for every row of a plate.

    .. math:: q(\theta, z_{1:N}) = q_0(\theta) \prod_n q(z_n; f(n, x_n))

    Subclasses are final and give the inference function :math:`f`: :class:`~pyro_avi.ConstantGuide`,
    :class:`~pyro_avi.AmortizedGuide`, :class:`~pyro_avi.FactorizedGuide`.

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
        # Hidden from the module: what is trained are the copies, one for each set of rows.
        self._given_family = (family or DiagonalNormal(),)
        self._given_global_guide = global_guide
        self._init_loc_fn, self._init_scale = init_loc_fn, init_scale
        self._structure: Structure | None = None
        self._sources: Sources | None = None
        self._depth = 0
        self._expected: dict[str, Any] | None = None
        self.global_guide: AutoGuide | None = None
        self.row_factors = nn.ModuleList()

    @abstractmethod
    def _create_function(
        self, of: RowFactor, initial: Tensor, found: Found, args: tuple, kwargs: Mapping[str, Any]
    ) -> nn.Module:
        """The inference function of a set of rows; ``initial [*B, P]`` are to be its values at the rows found."""

    @abstractmethod
    def _infer(self, of: RowFactor, found: Found, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The variational parameters ``[*B, P]`` of the rows found."""

    def _find_sources(self, structure: Structure) -> Sources | None:
        """What finds the rows of a call and what else the inference functions need to know; ``None``: the caller does."""
        unobserved = not structure.observations
        return Sources(self.model, tuple(structure.frames), latents=_names(structure), unobserved=unobserved)

    def _default_plates(self, trace: Trace) -> Sequence[str]:
        """The plates whose rows get factors of their own where none were asked for."""
        plate = row_plate(trace)
        return () if plate is None else (plate,)

    def setup(self, *args, **kwargs) -> "LocalGuide":
        """Look at the model and create all parameters, if that has not been done; return the guide.

        Args:
            *args, **kwargs: the arguments of the model.

        Raises:
            ValueError: if the model lacks a plate that was asked for, several could be meant, or nothing is observed.
        """
        if self._structure is not None:
            return self
        plates = self._default_plates if self._plates_asked is None else self._plates_asked
        structure = inspect_model(self.model, args, kwargs, plates=plates, init_loc_fn=self._init_loc_fn)
        self._check_rows(structure)
        self._structure = structure
        self._depth = max((-frame.dim for frame in self._frames()), default=0)
        self._sources = self._find_sources(structure)
        try:
            with quiet():
                self.row_factors.extend(RowFactor(r, copy.deepcopy(self._given_family[0])) for r in structure.row_sets)
                found, _ = self._find(args, kwargs, self._given_plates(args, kwargs), any_rows=True)
                for of in self.row_factors:
                    initial = of.factor.initial(self._init_scale)
                    of.factor.to(initial)
                    of.function = self._create_function(of, initial, found, args, kwargs)
                self.global_guide = self._create_global_guide(structure)
                if self.global_guide is not None:
                    self.plates = self._plates(self._frames(), {}, structure.without_size)
                    self.global_guide(*args, **kwargs)
                self._check_expected()
                self._take_pending()
        except BaseException:
            # A call that failed leaves no half-made guide behind.
            self._structure = self._sources = self.global_guide = None
            self.row_factors = nn.ModuleList()
            raise
        return self

    @property
    def _is_set_up(self) -> bool:
        return self._structure is not None

    def describe(self) -> dict[str, Any]:
        """What kind of guide this is, as plain data: all that its parameters do not say.

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
            "global_latents": {latent.name: list(latent.initial.shape) for latent in structure.global_latents},
            "row_sets": [
                {
                    "plates": list(of.rows.plates),
                    "latents": {latent.name: of.factor.row_shape(latent.name) for latent in of.rows.latents},
                }
                for of in self.row_factors
            ],
        }

    def expect(self, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Take these parameters when the guide is set up, and refuse a model of another description.

        Args:
            description: what :meth:`describe` said of the guide that the parameters are of.
            state: its ``state_dict``.
        """
        self._expected = dict(description)
        self.load_state_dict(state)

    def _check_expected(self) -> None:
        if self._expected is None:
            return
        expected = self._expected
        self.to(getattr(torch, expected["dtype"]))
        mine = self.describe()
        for part in mine:
            if mine[part] != expected[part]:
                raise ValueError(
                    f"Expected a model for which the guide has {part} = {expected[part]}, got {mine[part]}.\n"
                    "Pass the model, and arguments of the kind, that the guide was made with; for other rows of a "
                    "FactorizedGuide load it with its own and use avi.refine(model, guide, x_new, num_steps=...)."
                )

    def _check_rows(self, structure: Structure) -> None:
        for plate in self._plates_asked or ():
            if plate not in structure.frames:
                raise ValueError(f"Expected a latent in plate={plate!r}, found none.")
        if structure.row_sets:
            return
        check_latents(structure)
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
        hidden = _Hide(self.model, [latent.name for latent in structure.local_latents])
        if given is None:
            return MeanFieldNormal(hidden, init_loc_fn=self._init_loc_fn, init_scale=self._init_scale)
        guide = given if isinstance(given, nn.Module) else given(hidden)
        return guide if isinstance(guide, AutoGuide) else AutoCallable(hidden, guide)

    def forward(self, *args, **kwargs) -> dict[str, Tensor]:
        """Sample every latent of the model; return the values by site."""
        self.setup(*args, **kwargs)
        given = self._given_plates(args, kwargs)
        found, plates = self._find(args, kwargs, given, draw=True)
        self.plates = self._plates(self._frames(), {**given, **plates}, self._structure.without_size)
        result, statements = {}, {}
        if self._given_global_guide is None and self.global_guide is not None:
            # Its masks and scales were found along with the others.
            statements.update(self.global_guide.statements(self.plates, found))
        elif self.global_guide is not None:
            result.update(self.global_guide(*args, **kwargs))
        for of in self.row_factors:
            parameters = self._infer(of, found, args, kwargs)
            statements.update(of.factor.statements(parameters, self.plates, found.masks, found.scales, found.given))
        result.update((name, statements[name]()) for name in self._structure.order if name in statements)
        return result

    def _frames(self):
        structure = self._structure
        return [frame for latent in structure.global_latents + structure.local_latents for frame in latent.frames]

    def _find(
        self,
        args: tuple,
        kwargs: Mapping[str, Any],
        given: Mapping[str, pyro.plate],
        *,
        draw: bool = False,
        any_rows: bool = False,
    ) -> tuple[Found, dict[str, pyro.plate]]:
        """The rows of a call and the plates to put them in.

        Args:
            args, kwargs: of the call.
            given: plates that somebody else provides.
            draw: whether to draw rows where the model would draw them itself; otherwise all of them are taken.
            any_rows: whether a part of the rows does, where all cannot be read.
        """
        structure = self._structure
        if self._sources is None:
            self._require_plates(given)
            rows = {name: Rows(given[name].size, given[name].indices) for name in structure.frames}
            for name, of in rows.items():
                check_positions(name, of.size, of.index)
            return Found(rows, {}, {}, {}), {name: given[name] for name in structure.frames}
        call = self._sources.call(args, kwargs, self._counts(given))
        self._check_drawn([name for name in call.ignored if name not in given])
        rows, followed = {name: given[name].indices for name in call.drawn if name in given}, []
        for name, index in rows.items():
            check_positions(name, given[name].size, index)
        for name, (size, count) in call.drawn.items():
            if name not in given and draw:
                fn = self._drawn_rows(name, size, count)
                rows[name] = pyro.sample(name, fn, infer={"is_auxiliary": True})
            elif name not in given:
                # A batch whose positions nobody knows is a data set of its own.
                followed += [name] * (name in call.ignored)
                part = name in call.ignored or (any_rows and not call.traced)
                rows[name] = torch.arange(count if part else size, device=self._device)
        found = call.read(rows)
        found.rows.update((name, Rows(len(rows[name]), None)) for name in followed)
        plates = {}
        for name, frame in structure.frames.items():
            if name in given:
                self._check_given(given[name], found, call.drawn)
                plates[name] = given[name]
                continue
            of = found.rows[name]
            size = None if name in structure.without_size else of.size
            # The rows are settled; a statement of the plate's name would stand in the trace a second time.
            with poutine.block(hide=[name]) if name in call.drawn else nullcontext():
                plates[name] = pyro.plate(name, size, subsample=of.index, dim=frame.dim)
        return found, plates

    @staticmethod
    def _counts(given: Mapping[str, pyro.plate]) -> dict[str, int]:
        """The number of rows of each plate given that takes a part of its rows."""
        return {name: of.subsample_size for name, of in given.items() if of.subsample_size < of.size}

    def _check_drawn(self, ignored: Sequence[str]) -> None:
        """Refuse rows that the model draws and makes nothing of; no matter where rows have no parameters of their own."""

    def _drawn_rows(self, name: str, size: int, count: int) -> DrawnRows:
        """The rows of a plate that the model would draw itself."""
        return DrawnRows(size, count, self._depth, self._device)

    def _require_plates(self, given: Mapping[str, pyro.plate]) -> None:
        for name in self._structure.frames:
            if name not in given:
                raise ValueError(
                    f"Expected create_plates() to return plate {name!r}, got {sorted(given)}.\n"
                    "With inputs= and create_plates= the guide knows the rows of a call from these alone."
                )

    def _check_given(self, plate: pyro.plate, found: Found, drawn) -> None:
        rows = found.rows[plate.name]
        expected = torch.arange(rows.size) if rows.index is None else rows.index
        if plate.name not in drawn and not torch.equal(plate.indices.cpu(), expected.cpu()):
            raise ValueError(
                f"Expected plate {plate.name!r} to hold the {len(expected)} rows that the model works on, got "
                f"{len(plate.indices)} others.\nPass create_plates= a function that returns pyro.plate({plate.name!r}, "
                "size, subsample=...) with the rows of the call."
            )

    @property
    def row_plates(self) -> tuple[str, ...]:
        """The names of the plates whose rows have factors of their own."""
        self._require_setup()
        return tuple(self._structure.frames)

    @property
    def global_latents(self) -> tuple[str, ...]:
        """The names of the latents outside these plates."""
        self._require_setup()
        return tuple(latent.name for latent in self._structure.global_latents)

    @property
    def family(self) -> Family:
        """The set that each factor is taken from."""
        return self._given_family[0]

    def _require_setup(self):
        if self._structure is None:
            raise ValueError(
                f"Expected a {type(self).__name__} with parameters, got one that has never seen the model's arguments.\n"
                "Call guide.setup(*args) with the arguments of the model first."
            )

    def _by_rows(self, get: Callable[[RowFactor], Any]) -> Any:
        """Something of the row set where there is one, by plates where there are several."""
        self._require_setup()
        if len(self.row_factors) == 1:
            return get(self.row_factors[0])
        return {of.rows.plates: get(of) for of in self.row_factors}

    @property
    def _device(self) -> torch.device:
        # Asked at every call, and a walk through all modules takes longer than a draw.
        for of in self.row_factors:
            if of.function is not None:
                return next(of.function.parameters()).device
        return self._like.device

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and device of the guide, which may have been moved since it was set up."""
        initials = [latent.initial for latent in self._structure.local_latents + self._structure.global_latents]
        own = (tensor for tensor in itertools.chain(self.parameters(), initials) if tensor.is_floating_point())
        return next(own, torch.zeros((), device=initials[0].device))

    def local_parameters(self) -> list[nn.Parameter]:
        """The parameters of the inference functions; all others of the guide belong to the global latents."""
        return list(self.row_factors.parameters())

    def variational_parameters(self, *args, **kwargs) -> Tensor | dict[tuple[str, ...], Tensor]:
        """What the inference function gives for the rows of a call: ``[B, P]``.

        Several plates of one row set have a dimension each; several row sets give a dictionary by the names of their plates.

        Args:
            *args, **kwargs: the arguments of the model. Where it draws its rows itself, the answer is for all ``N``.
        """
        self.setup(*args, **kwargs)
        with poutine.block():
            found, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            return self._by_rows(lambda of: self._infer(of, found, args, kwargs))

    def posterior(self, *args, **kwargs) -> dist.TorchDistribution | dict[tuple[str, ...], dist.TorchDistribution]:
        """The local factors of the rows of a call: batch shape ``[B]``, event shape ``[K]``, unconstrained coordinates.

        Discrete latents have factors of their own, which are not among them. Several row sets give a dictionary.

        Args:
            *args, **kwargs: the arguments of the model.
        """
        self.setup(*args, **kwargs)
        with poutine.block():
            found, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            return self._by_rows(lambda of: of.factor.distribution(self._known(of, found, args, kwargs)))

    def _known(self, of: RowFactor, found: Found, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The variational parameters ``[*B, P]`` of the rows found, sure of the discrete latents that the call observes."""
        return of.factor.known(self._infer(of, found, args, kwargs), found.given)

    @torch.no_grad()
    def posterior_by_row(
        self, batches: Iterable[tuple], *, sites: Sequence[str] | None = None, num_samples: int | None = None
    ) -> dict[str, Tensor]:
        """Draws or means of local latents for all batches of a loader, put together by their rows, in main memory.

        Beyond the answer itself no more is held than one batch needs.

        Args:
            batches: tuples of the model's arguments. Batches that give the positions of their rows fill these rows, until
                every row of the plate has been seen; others follow one another, until they end.
            sites: the latents asked for; by default all local ones.
            num_samples: the number of independent draws, leftmost in the answer; by default the means. Those of discrete
                sites are exact, those of real ones for symmetric families; the others are the average of 1,000 draws.

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
        merged: dict[tuple[str, ...], Merged] = {}
        for call in batches:
            self.setup(*call)
            asked = self._sites_by_rows(sites)
            merged = merged or {
                of.rows.plates: Merged(of.rows.plates, {name: of.factor.row_dims(name) for name in names})
                for of, names in asked
            }
            with poutine.block():
                found, _ = self._find(call, {}, self._given_plates(call, {}))
                for of, names in asked:
                    values = self._summarize(of, found, call, num_samples)
                    merged[of.rows.plates].add(found.rows, {name: values[name] for name in names})
            if all(each.complete for each in merged.values()):
                break
        if not merged:
            raise ValueError("Expected at least one batch, got none.")
        return {name: value for each in merged.values() for name, value in each.result().items()}

    def _summarize(self, of: RowFactor, found: Found, call: tuple, num_samples: int | None) -> dict[str, Tensor]:
        """Draws or means of the sites of a set of rows; what the call observes of them, as it is."""
        parameters = self._known(of, found, call, {})
        values = of.factor.mean(parameters) if num_samples is None else of.factor.draw(parameters, num_samples)
        values.update((name, given.expand(values[name].shape)) for name, given in found.given.items() if name in values)
        return values

    def _sites_by_rows(self, sites: Sequence[str] | None) -> list[tuple[RowFactor, list[str]]]:
        """The sites asked for, by the set of rows that they belong to."""
        known = [latent.name for latent in self._structure.local_latents]
        asked = known if sites is None else list(sites)
        if not asked or not set(asked) <= set(known):
            raise ValueError(f"Expected sites= among the local latents {known}, got {asked}.")
        found = [(of, [latent.name for latent in of.rows.latents if latent.name in asked]) for of in self.row_factors]
        return [(of, names) for of, names in found if names]

    def _all_rows(self) -> Found | None:
        """All rows of the plates, for an answer without the arguments that the model needs; ``None`` where it needs none."""
        if not _needs_arguments(self.model):
            return None
        sizes = {name: frame.full_size or frame.size for name, frame in self._structure.frames.items()}
        return Found({name: Rows(size, None) for name, size in sizes.items()}, {}, {}, {})

    @torch.no_grad()
    def median(self, *args, **kwargs) -> dict[str, Tensor]:
        """The posterior median of each latent, by site.

        Args:
            *args, **kwargs: the arguments of the model. Without them, constant and factorized guides answer for all rows
                that they were set up with.
        """
        self.setup(*args, **kwargs)
        return self._quantiles(0.5, args, kwargs, lambda guide: guide.median(*args, **kwargs))

    @torch.no_grad()
    def quantiles(self, quantiles, *args, **kwargs) -> dict[str, Tensor]:
        """Posterior quantiles of each latent, by site, ``quantiles`` leftmost.

        Args:
            quantiles: numbers between 0 and 1.
            *args, **kwargs: the arguments of the model, as for :meth:`median`.
        """
        self.setup(*args, **kwargs)
        return self._quantiles(quantiles, args, kwargs, lambda guide: guide.quantiles(quantiles, *args, **kwargs))

    def _quantiles(self, quantiles, args, kwargs, of_globals) -> dict[str, Tensor]:
        result = {} if self.global_guide is None else dict(of_globals(self.global_guide))
        with poutine.block():
            found = None if args or kwargs else self._all_rows()
            if found is None:
                found, _ = self._find(args, kwargs, self._given_plates(args, kwargs))
            for of in self.row_factors:
                parameters = self._known(of, found, args, kwargs)
                result.update(of.factor.quantile(parameters, torch.as_tensor(quantiles).to(parameters)))
        # What a call observes is no latent of it.
        return {name: value for name, value in result.items() if name not in found.given}


def _needs_arguments(model: Callable) -> bool:
    try:
        inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind()
    except TypeError:
        return True
    return False


def _names(structure: Structure) -> list[str]:
    return [latent.name for latent in structure.global_latents + structure.local_latents]


def qualified_name(value: Any) -> str:
    """Of a function or of an object's class."""
    named = value if isinstance(value, FunctionType | type) else type(value)
    return f"{named.__module__}.{named.__qualname__}"
