"""A call of a model and a guide in which the latents of rows can be changed, to see what depends on them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_avi.densities.dependence import find_rows, row_codes
from pyro_avi.densities.log_factors import (
    LogFactor,
    drawn_traces,
    enumeration_depth,
    is_enumerated,
    log_factors,
    trace_at,
)
from pyro_avi.densities.program_digest import ProgramDigest
from pyro_avi.inspection.sites import give_sizes, is_latent

__all__ = ["HasRowPlates", "PerturbedCall", "Plates", "row_frames"]

Plates = tuple[str, ...]
Factors = tuple[list[LogFactor], list[LogFactor]]
# A discrete latent with at most so many values is changed to the next one; one with more is drawn again.
_MOST_VALUES = 64
# Rows that an element ties are told apart by changing one at a time, where there are at most so many.
_FEW_ROWS = 100


@runtime_checkable
class HasRowPlates(Protocol):
    """A guide that is a product over the rows of plates, given the global latents."""

    @property
    def row_plates(self) -> tuple[str, ...]:
        """The names of these plates."""
        ...


def row_frames(frames: Iterable[CondIndepStackFrame], plates: Plates) -> list[CondIndepStackFrame]:
    """The frames that belong to the plates of the rows, the leftmost dimension first."""
    return sorted((frame for frame in frames if frame.name in plates), key=lambda frame: frame.dim)


class PerturbedCall:
    """One call with latents drawn once, and its factors when the latents of some rows are changed.

    Args:
        model, guide, args, kwargs, plates, exclude, traces: as for :func:`~pyro_avi.densities.attribution.attribute`.

    Attributes:
        row_sets: the frames of each set of rows, by the names of its plates. Rows are numbered through all sets.
        model_factors, guide_factors: the factors at the latents that were drawn.
        depth: the number of dimensions of the plates.
        is_product: whether the guide is known for a product over rows.
        has_globals: whether rows share latents.
        digest: of the program of the call: who depends on whom is the same where it is; ``None`` where that is not known.

    Raises:
        ValueError: if there are no sites in the plates.
    """

    def __init__(
        self,
        model,
        guide,
        args: tuple,
        kwargs: Mapping[str, Any],
        plates: Plates,
        *,
        exclude: Sequence[str] = (),
        traces: tuple[Trace, Trace] | None = None,
    ):
        self._model, self._guide, self._args, self._kwargs, self._exclude = model, guide, args, kwargs, exclude
        self.plates = plates
        guided, plain = drawn_traces(model, guide, args, kwargs) if traces is None else traces
        give_sizes(plain)
        self._enumeration = enumeration_depth(plain, guided.nodes)
        # All values but those of latents that are to be enumerated.
        self._given = guided.copy()
        for name, site in plain.nodes.items():
            if site["type"] == "sample" and name not in guided.nodes and not site["infer"].get("enumerate"):
                self._given.add_node(name, **site)
        self._latents, self.row_sets = self._find_rows(plain)
        # The density of such a guide is a product over rows: no change is needed to see that.
        self.is_product = guide is None or (isinstance(guide, HasRowPlates) and set(plates) <= set(guide.row_plates))
        program = self._program()
        with program:
            self._traces, (self.model_factors, self.guide_factors) = self._evaluate(self._given)
        frames = [frame for factor in self.model_factors + self.guide_factors for frame in factor.frames]
        self.depth = max((-frame.dim for frame in frames), default=0)
        self.has_globals = self._has_globals(plain)
        dtypes = [self._given.nodes[name]["value"].dtype for name in self._latents]
        self._rounding = 1e-13 if dtypes and all(dtype == torch.float64 for dtype in dtypes) else 3e-7
        program.add(plates, tuple(exclude), self._latents.keys(), self.is_product, self.has_globals, self._rounding)
        for trace in self._traces:
            program.add_trace(trace)
        self.digest = program.digest()

    def _program(self) -> ProgramDigest:
        latents = {name: site["value"] for name, site in self._given.nodes.items() if is_latent(site)}
        of_rows = [value for name, value in latents.items() if name in self._latents]
        return ProgramDigest(of_rows, [value for name, value in latents.items() if name not in self._latents])

    def _find_rows(self, plain: Trace) -> tuple[dict[str, tuple[Any, Plates]], dict[Plates, list[CondIndepStackFrame]]]:
        latents, row_sets = {}, {}
        for name, site in plain.nodes.items():
            if site["type"] == "sample" and is_latent(site):
                frames = row_frames(site["cond_indep_stack"], self.plates)
                if frames:
                    names = tuple(frame.name for frame in frames)
                    latents[name], row_sets[names] = (site["fn"], names), frames
        found = {frame.name: frame for site in plain.nodes.values() for frame in site.get("cond_indep_stack", ())}
        for plate in self.plates:
            if plate not in found:
                raise ValueError(f"Expected sites in plate {plate!r}, found none.")
        if not row_sets:
            # The rows have no latents of their own, or the whole call is one row.
            row_sets[self.plates] = row_frames(found.values(), self.plates)
        return latents, row_sets

    def _has_globals(self, plain: Trace) -> bool:
        if not self.plates:
            return False
        auxiliary = [
            factor
            for factor in self.guide_factors
            if self._given.nodes[factor.sites[0]]["infer"].get("is_auxiliary")
            and not row_frames(factor.frames, self.plates)
        ]
        outside = [name for name, site in plain.nodes.items() if is_latent(site) and name not in self._latents]
        return bool(outside) or any(bool((factor.value != 0).any()) for factor in auxiliary)

    def _evaluate(self, given: Trace, *, guided: bool = True) -> tuple[list[Trace], Factors]:
        traces = [trace_at(self._model, self._args, self._kwargs, given, depth=self._enumeration)]
        guide_factors = []
        if self._guide is not None and guided:
            traces.append(trace_at(self._guide, self._args, self._kwargs, given, depth=None))
            guide_factors = log_factors(traces[1])
        return traces, (log_factors(traces[0], exclude=self._exclude), guide_factors)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows of each set."""
        return tuple(torch.Size([frame.size for frame in frames]).numel() for frames in self.row_sets.values())

    @property
    def num_rows(self) -> int:
        """The number of rows of all sets together."""
        return sum(self.sizes)

    @property
    def device(self) -> torch.device:
        """The device of the densities."""
        return self.model_factors[0].value.device

    def offset(self, plates: Plates) -> int:
        """The number of the first row of a set."""
        return sum(self.sizes[: list(self.row_sets).index(plates)])

    def positions(self, plates: Plates) -> Tensor:
        """The position of each row within its set, with the dimensions of the plates, ``depth`` in all."""
        position = torch.zeros((1,) * self.depth, dtype=torch.long)
        for frame in self.row_sets[plates]:
            along = torch.arange(frame.size).view(
                [frame.size if dim == frame.dim else 1 for dim in range(-self.depth, 0)]
            )
            position = position * frame.size + along
        return position

    def padded(self, factor: LogFactor) -> tuple[int, ...]:
        """The shape of a factor's elements with all ``depth`` dimensions of plates."""
        return (1,) * (self.depth - factor.value.dim()) + tuple(factor.value.shape)

    def dependent_rows(self) -> tuple[Tensor, list[Tensor], Tensor]:
        """The rows that each element depends on, of the model's factors first and then of the guide's.

        Returns:
            ``[row sets, E]`` a row of each set, -1 where the element depends on none; the sets of rows that some element
            ties; ``[E]`` whether an element ties rows.
        """
        rows, ties = [], []
        count = sum(factor.value.numel() for factor in self.model_factors + self.guide_factors)
        tying = torch.zeros(count, dtype=torch.bool)
        for plates, size in zip(self.row_sets, self.sizes, strict=True):
            if not any(own == plates for _, own in self._latents.values()):
                rows.append(torch.full((count,), -1))
                continue
            codes = [row_codes(size)]
            changes = [self._changes(plates, codes[0])]
            found, tied = find_rows(codes, changes)
            if tied and size > 2:
                # An element that depends on several rows can look as if it depended on others too. Rows are told apart by
                # changing them one at a time, or by codes in another order.
                alone = [torch.eye(size, dtype=torch.bool)]
                codes += alone if size <= _FEW_ROWS else [codes[0][torch.randperm(size)] for _ in range(3)]
                changes += [self._changes(plates, code) for code in codes[1:]]
                found, tied = find_rows(codes, changes)
            offset = self.offset(plates)
            rows.append(torch.where(found < 0, -1, found + offset))
            ties += [rows_tied + offset for rows_tied in tied]
            tying |= changes[0].sum(0) > codes[0][0].sum()
        every = torch.stack(rows)
        return every, ties, tying | ((every >= 0).sum(0) > 1)

    def _changes(self, plates: Plates, codes: Tensor) -> Tensor:
        """``[L, E]`` whether each element changes when the latents of the rows with a bit set are changed."""
        before = self._flat((self.model_factors, self.guide_factors))
        others = self._others()
        changes = []
        for chosen in codes.T:
            _, factors = self._evaluate(self._mixed({plates: chosen}, others), guided=not self.is_product)
            if self.is_product:
                factors = (factors[0], self.guide_factors)
            changes.append((~self.same(before, self._flat(factors))).cpu())
        return torch.stack(changes)

    @staticmethod
    def _flat(factors: Factors) -> Tensor:
        return torch.cat([factor.value.flatten() for part in factors for factor in part])

    def same(self, one: Tensor, two: Tensor) -> Tensor:
        """Which numbers are equal up to rounding."""
        close = (one - two).abs() <= self._rounding * torch.maximum(one.abs(), two.abs())
        return close | (one == two) | (one.isnan() & two.isnan())

    def with_changed(self, rows: Mapping[Plates, Tensor], *, guided: bool = True) -> Factors:
        """The factors after the latents of some rows were changed, chosen by ``[N]`` booleans for each set."""
        return self._evaluate(self._mixed(rows, self._others()), guided=guided)[1]

    def _others(self) -> dict[str, Tensor]:
        return {name: _another(fn, self._given.nodes[name]["value"]) for name, (fn, _) in self._latents.items()}

    def _mixed(self, rows: Mapping[Plates, Tensor], others: Mapping[str, Tensor]) -> Trace:
        mixed = self._given.copy()
        for name, (fn, plates) in self._latents.items():
            if plates in rows:
                value = self._given.nodes[name]["value"]
                chosen = rows[plates][self.positions(plates)]
                batch = value.dim() - fn.event_dim
                chosen = chosen.reshape(chosen.shape[self.depth - batch :] + (1,) * fn.event_dim).to(value.device)
                mixed.nodes[name] = {**mixed.nodes[name], "value": torch.where(chosen, others[name], value)}
        return mixed

    def sites_of(self, elements: Tensor) -> Iterator[str]:
        """The sites that elements ``[E]`` belong to."""
        factors = self.model_factors + self.guide_factors
        parts = elements.split([factor.value.numel() for factor in factors])
        return (name for factor, part in zip(factors, parts, strict=True) if bool(part.any()) for name in factor.sites)

    def unaccounted(self) -> Iterator[str]:
        """The sites that no factor contains, or whose log density differs from that of their factor."""
        for trace, factors in zip(self._traces, (self.model_factors, self.guide_factors), strict=False):
            inside = {name: factor for factor in factors for name in factor.sites}
            for name, site in prune_subsample_sites(trace).nodes.items():
                if site["type"] != "sample" or name in self._exclude:
                    continue
                if name not in inside:
                    yield name
                elif len(inside[name].sites) == 1 and not is_enumerated(site):
                    total = torch.as_tensor(site["log_prob"]).double().sum()
                    if not bool(self.same(total, inside[name].value.sum())):
                        yield name


def _another(fn: Any, value: Tensor) -> Tensor:
    """Another value of a latent in every row: moved in unconstrained coordinates, or the next value of a discrete one."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.boolean:
        return 1 - value
    if support.is_discrete:
        return _next(fn, value)
    try:
        transform = biject_to(support)
        moved = transform.inv(value)
        moved = transform(moved + (0.5 + torch.rand_like(moved)) * torch.where(torch.rand_like(moved) < 0.5, -1, 1))
    except NotImplementedError:
        return fn.sample()
    return moved if bool(moved.isfinite().all()) else fn.sample()


def _next(fn: Any, value: Tensor) -> Tensor:
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError:
        return fn.sample()
    if len(values) > _MOST_VALUES:
        return fn.sample()
    moved = value
    for one, two in zip(values, values.roll(-1, 0), strict=True):
        is_one = (value == one).flatten(value.dim() - fn.event_dim).all(-1) if fn.event_dim else value == one
        moved = torch.where(is_one.reshape(is_one.shape + (1,) * fn.event_dim), two, moved)
    return moved
