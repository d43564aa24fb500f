"""The log joint of a call as a function of the local latents of its rows and of its data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_feasible
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_avi.densities.in_double import in_double
from pyro_avi.densities.log_factors import enumeration_depth, log_factors, trace_at
from pyro_avi.inspection.inspect_model import inspect_model
from pyro_avi.inspection.sites import row_plates
from pyro_avi.inspection.structure import Latent, RowSet
from pyro_avi.seeds import seeded
from pyro_avi.sufficiency.data import find_leaves, grid_of

__all__ = ["Joint", "Point", "no_rows"]

# Values of data are changed by about a tenth, so that those of a bounded range mostly stay in it.
_RELATIVE = 0.1
_TRIES = 5


class _Observe(Messenger):
    """Give observed sites other values."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg):
        if msg["is_observed"] and msg["name"] in self._values:
            msg["value"] = self._values[msg["name"]]


@dataclass(frozen=True)
class Point:
    """Values of all latents and data.

    Attributes:
        latents: by site, continuous ones in unconstrained coordinates.
        data: of each leaf.
        seed: of the draws that a model makes outside of sample sites.
    """

    latents: Mapping[str, Tensor]
    data: Sequence[Tensor]
    seed: int = 0


class Joint:
    """The log joint of a call, in double precision.

    Args:
        model, args, kwargs: any Pyro callable and its arguments.
        plates: the names of the plates of the rows; ``None`` for those that hold a latent and an observation, or else for
            those that hold a latent.
        fixed: the names of arguments that are no data.

    Attributes:
        row_sets: the sets of rows with their latents.
        offsets: the number of the first row of each set, where rows are numbered through all sets; last their number.
        continuous, discrete: the latents of each kind.
        rows: by latent the number of the row that each element belongs to.
        leaves: the data.

    Raises:
        ValueError: if there is no latent in a plate.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        plates: Sequence[str] | None,
        fixed: Sequence[str],
    ):
        self._model = model
        self._leaves, self._spec = tree_flatten((args, dict(kwargs)))
        self._leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        structure = inspect_model(
            model, args, kwargs, plates=_default_plates if plates is None else plates, init_loc_fn=init_to_feasible
        )
        if not structure.row_sets:
            raise no_rows()
        self.row_sets = structure.row_sets
        self.latents, self._globals = structure.local_latents, structure.global_latents
        self.offsets = [0]
        self.rows: dict[str, Tensor] = {}
        for rows in self.row_sets:
            for latent in rows.latents:
                dims = [latent.initial.dim() + f.dim - latent.unconstrained_event_dim for f in rows.frames]
                self.rows[latent.name] = grid_of(latent.initial.shape, dims) + self.offsets[-1]
            self.offsets.append(self.offsets[-1] + torch.Size([frame.size for frame in rows.frames]).numel())
        self.continuous = tuple(latent for latent in self.latents if latent.num_values is None)
        self.discrete = tuple(latent for latent in self.latents if latent.num_values is not None)
        base, traced = self._first_runs()
        self._depth = enumeration_depth(base, ())
        self._subsamples = {name: site for name, site in base.nodes.items() if site_is_subsample(site)}
        self.leaves = find_leaves(model, args, kwargs, traced, list(structure.frames), fixed)

    def _first_runs(self) -> tuple[Trace, Trace]:
        """A trace, and one whose observed values have gradients where they follow from arguments of real numbers."""
        args, kwargs = tree_unflatten(self._leaves, self._spec)
        base = poutine.trace(self._model).get_trace(*args, **kwargs)
        leaves = [
            leaf.clone().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in self._leaves
        ]
        args, kwargs = tree_unflatten(leaves, self._spec)
        with torch.enable_grad():
            return base, poutine.trace(poutine.replay(self._model, trace=base)).get_trace(*args, **kwargs)

    @property
    def num_rows(self) -> int:
        """The number of rows of all sets."""
        return self.offsets[-1]

    def rows_of(self, rows: RowSet) -> slice:
        """The numbers of the rows of a set."""
        at = self.row_sets.index(rows)
        return slice(self.offsets[at], self.offsets[at + 1])

    def point(self, seed: int) -> Point:
        """Random latents, and data changed at random, at which log joint and gradient are finite."""
        for attempt in range(_TRIES):
            with seeded(seed + 1000 * attempt):
                point = Point(
                    {latent.name: self.draw(latent) for latent in (*self._globals, *self.latents)}, self._data()
                )
            if bool(torch.isfinite(self(point))):
                return point
        raise FloatingPointError("its log joint is not finite at random points")

    def draw(self, latent: Latent) -> Tensor:
        """Random unconstrained values of a latent; of a discrete one random values."""
        if latent.num_values is None:
            return torch.empty_like(latent.initial, dtype=torch.double).uniform_(-1.5, 1.5)
        if latent.is_one_hot:
            chosen = torch.randint(latent.num_values, latent.initial.shape[:-1])
            return torch.nn.functional.one_hot(chosen, latent.num_values).to(latent.initial)
        return torch.randint(latent.num_values, latent.initial.shape).to(latent.initial)

    def moved(self, point: Point, rows: Tensor) -> Point:
        """The point with other values of the discrete latents of some rows ``[R]``."""
        latents = dict(point.latents)
        for latent in self.discrete:
            value = latents[latent.name]
            other = value.roll(1, -1) if latent.is_one_hot else (value + 1) % (latent.num_values or 1)
            latents[latent.name] = torch.where(rows[self.rows[latent.name]].to(value.device), other, value)
        return Point(latents, point.data, point.seed)

    def rows_with_discrete(self) -> list[int]:
        """The numbers of the rows that have discrete latents."""
        rows = [self.rows[latent.name].flatten() for latent in self.discrete]
        return torch.cat(rows).unique().tolist() if rows else []

    def _data(self) -> list[Tensor]:
        values = []
        for leaf in self.leaves:
            if leaf.is_float:
                value = leaf.value.double()
                noise = 2 * torch.rand_like(value) - 1
                values.append(value * (1 + _RELATIVE * noise))
            else:
                values.append(leaf.value)
        return values

    def __call__(self, point: Point) -> Tensor:
        """The log joint at a point, without the determinants of transforms: they are sums over rows."""
        leaves = list(self._leaves)
        observed: dict[str, Tensor] = {}
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves[at] = leaf.double()
        for leaf, value in zip(self.leaves, point.data, strict=True):
            if leaf.position is None:
                observed[leaf.name] = value
            else:
                leaves[leaf.position] = value
        args, kwargs = tree_unflatten(leaves, self._spec)
        given = Trace()
        for name, site in self._subsamples.items():
            given.add_node(name, **site)
        # As `torch.manual_seed`, which would take longer than all the rest.
        torch.default_generator.manual_seed(point.seed)
        with pyro.validation_enabled(False), in_double(), torch.enable_grad():
            for latent in (*self._globals, *self.latents):
                value = point.latents[latent.name]
                value = value if latent.num_values is not None else latent.to_support(value)
                given.add_node(latent.name, type="sample", is_observed=False, value=value, infer={})
            trace = trace_at(_Observe(observed)(self._model), args, kwargs, given, depth=self._depth)
            # Without enumerated latents the factors are not needed.
            plain = self._depth is None
            total = trace.log_prob_sum() if plain else sum(factor.value.sum() for factor in log_factors(trace))
            return torch.as_tensor(total, dtype=torch.double)


def _default_plates(trace: Trace) -> list[str]:
    found = row_plates(trace)
    if found:
        return found
    latents = {
        frame.name
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        for frame in site["cond_indep_stack"]
    }
    return sorted(latents)


def no_rows() -> ValueError:
    """The error for a model without rows."""
    return ValueError(
        "Expected a model with latents in a plate, whose rows an encoder could answer for, got none.\n"
        "A verdict is about local latents: write them in a pyro.plate, or name it by plate=..."
    )
