"""Which arguments of a model its rows depend on beyond what is observed: covariates, exposures, weights, masks of latents.

An argument is one of a row set if exchanging one of its rows changes the densities of that row and of no other, with all
latents and observations held where they are. The model is run and never looked into, so that it may use the argument in any
way, by NumPy too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from pyro_avi.calls.replay import Recorder
from pyro_avi.encoder_inputs.arguments import argument_at, shuffled, used_as_index, with_another_row
from pyro_avi.encoder_inputs.covariate import Covariate
from pyro_avi.encoder_inputs.standardize import transform_of
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.masks import site_mask
from pyro_avi.inspection.sites import equal, is_observation
from pyro_avi.inspection.structure import RowSet
from pyro_avi.rows.subsample import Subsample

__all__ = ["CovariateSearch"]


class _CannotExchange(Exception):
    """Why the rows of an argument cannot be exchanged."""


class _Hold(Messenger):
    """Fix sites to given values."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self._values = values

    def _pyro_sample(self, msg):
        if msg["name"] in self._values:
            msg["value"], msg["done"] = self._values[msg["name"]], True


class CovariateSearch:
    """Looks for the covariates of one row set.

    Args:
        model: any Pyro callable.
        args, kwargs: its arguments.
        rows: the row set.

    Attributes:
        undecided: by argument why nothing is known of it.
    """

    # The number of rows that are exchanged in turn.
    _tries = 3

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], rows: RowSet):
        self._model, self._rows = model, rows
        paths, self._spec = tree_flatten_with_path((args, dict(kwargs)))
        self._leaves = [leaf for _, leaf in paths]
        self._arguments = [argument_at(model, path) for path, _ in paths]
        self._base: Any = None
        self.undecided: dict[str, str] = {}

    def named(self, description: Mapping[str, Any]) -> Covariate:
        """The covariate with a description that was saved.

        Raises:
            ValueError: if there is no such argument.
        """
        for argument in self._arguments:
            if argument.name == description["argument"]:
                return Covariate(**{**description, "dims": tuple(description["dims"]), "argument": argument})
        raise ValueError(
            f"Expected a tensor {description['argument']} among the arguments of the model, which the encoder reads, got "
            f"none among {[argument.name for argument in self._arguments]}."
        )

    def find(self, sizes: Mapping[str, Subsample], observed: Mapping[str, Tensor]) -> list[Covariate]:
        """The covariates.

        Args:
            sizes: the rows of the call by plate.
            observed: the observed values that are read anyway, by site.
        """
        subsamples = [sizes[name] for name in self._rows.plates]
        lengths = {number for subsample in subsamples for number in (subsample.size, len(subsample))}
        found = []
        for position, leaf in enumerate(self._leaves):
            if not _is_tensor(leaf) or not lengths & set(leaf.shape):
                continue
            known = [*observed.values(), *(subsample.index for subsample in subsamples if subsample.index is not None)]
            if any(leaf is value or equal(leaf, value) for value in known):
                continue
            try:
                found.append(self._covariate(position, subsamples, observed))
            except _CannotExchange as error:
                self.undecided[self._arguments[position].name] = str(error)
        return [covariate for covariate in found if covariate is not None]

    def by_size(self, name: str, sizes: Mapping[str, Subsample]) -> Covariate | None:
        """A tensor argument by its name, its rows in the dimensions of their number; ``None`` if it has not all of them.

        Args:
            name: of the argument.
            sizes: the rows of the call by plate.
        """
        for argument, leaf in zip(self._arguments, self._leaves, strict=True):
            if argument.name != name or not _is_tensor(leaf):
                continue
            dims: list[int | None] = []
            for plate in self._rows.plates:
                free = [dim for dim in range(leaf.dim()) if dim not in dims and leaf.shape[dim] == sizes[plate].size]
                dims.append(free[0] if free else None)
            if dims[-1] is not None:
                return Covariate(argument, tuple(dims), True, transform_of(leaf))
        return None

    def _covariate(
        self, position: int, subsamples: Sequence[Subsample], observed: Mapping[str, Tensor]
    ) -> Covariate | None:
        leaf = self._leaves[position]
        if not leaf.is_floating_point() and leaf.dtype != torch.bool and self._is_index(position):
            return None
        dims: list[int | None] = []
        by_position = False
        for axis, subsample in enumerate(subsamples):
            rows, size = self._positions(axis, subsample)
            call = torch.arange(len(rows), device=rows.device)
            free = [dim for dim in range(leaf.dim()) if dim not in dims]
            found = self._dim(position, axis, free, call, len(rows))
            if found is None and not torch.equal(rows, call):
                found = self._dim(position, axis, free, rows, size)
                by_position |= found is not None
            dims.append(found)
        if all(dim is None for dim in dims) or self._is_read(position, observed):
            return None
        return Covariate(self._arguments[position], tuple(dims), by_position, transform_of(leaf))

    def _dim(self, position: int, axis: int, dims: Sequence[int], rows: Tensor, size: int) -> int | None:
        """The dimension of an argument that holds the rows of a plate at given positions."""
        for dim in dims:
            if self._leaves[position].shape[dim] == size and self._is_aligned(position, axis, dim, rows):
                if size > 1:
                    return dim
                self.undecided[self._arguments[position].name] = "one row does not tell whose it is"
        return None

    def _is_aligned(self, position: int, axis: int, dim: int, positions: Tensor) -> bool:
        """Whether a change at the position of one row changes its densities and those of no other."""
        leaf, base, matters = self._leaves[position], self._densities(), False
        for row in sorted({0, len(positions) // 2, len(positions) - 1}):
            at = int(positions[row])
            now = self._densities(position, with_another_row(leaf, dim, at))
            changed = _differs(now, base).movedim(axis, 0).reshape(base.shape[axis], -1).any(-1)
            matters |= bool(changed[row])
            changed[row] = False
            if changed.any():
                return False
        return matters

    def _positions(self, axis: int, subsample: Subsample) -> tuple[Tensor, int]:
        """The positions ``[B]`` of the rows in the run that all others are compared with, and the size of their plate."""
        self._densities()
        site = self._base.nodes.get(self._rows.plates[axis])
        if site is not None:
            return torch.as_tensor(site["value"]), site["fn"].size
        return (torch.arange(subsample.size) if subsample.index is None else subsample.index), subsample.size

    def _densities(self, position: int | None = None, value: Tensor | None = None) -> Tensor:
        """The log densities by row, ``[*B]``, with one argument replaced."""
        if self._base is None:
            self._base = self._run(self._leaves, {})
            self._at_base = self._by_row(self._run(self._leaves, self._values()))
        leaves = [value if at == position else leaf for at, leaf in enumerate(self._leaves)]
        return self._at_base if position is None else self._by_row(self._run(leaves, self._values()))

    def _values(self, *, observed: bool = True) -> dict[str, Tensor]:
        nodes = self._base.nodes.items()
        return {
            name: site["value"].clone() for name, site in nodes if _is_drawn(site) or observed and is_observation(site)
        }

    def _run(self, leaves: Sequence[Any], values: Mapping[str, Tensor]) -> Trace:
        args, kwargs = tree_unflatten([leaf.detach() if _is_tensor(leaf) else leaf for leaf in leaves], self._spec)
        with isolated_run(0), pyro.validation_enabled(False), InitMessenger(_start), _Hold(values):
            try:
                return poutine.trace(self._model).get_trace(*args, **kwargs)
            except Exception as error:
                how = "at other latents" if self._base is None else "with its rows exchanged"
                first = str(error).partition("\n")[0]
                raise _CannotExchange(f"{how} the model raises {type(error).__name__}: {first}") from error

    def _by_row(self, trace: Trace) -> Tensor:
        total: Any = 0.0
        with isolated_run(), pyro.validation_enabled(False):
            trace.compute_log_prob(lambda name, site: self._counts(site))
        for site in trace.nodes.values():
            if self._counts(site):
                frames = {frame.name: frame for frame in site["cond_indep_stack"]}
                total = total + _sum_to(site["log_prob"], [frames[name] for name in self._rows.plates])
        return total

    def _counts(self, site: Mapping[str, Any]) -> bool:
        if site["type"] != "sample" or site_is_subsample(site) or site["infer"].get("_deterministic"):
            return False
        return set(self._rows.plates) <= {frame.name for frame in site["cond_indep_stack"]}

    def _is_read(self, position: int, observed: Mapping[str, Tensor]) -> bool:
        """Whether an observed value, or its mask, is computed from an argument with as many elements."""
        leaf = self._leaves[position]
        leaves = [shuffled(leaf) if at == position else each for at, each in enumerate(self._leaves)]
        now = self._run(leaves, self._values(observed=False))
        for name in observed:
            for read in (lambda site: site["value"], _mask_values):
                one: Any = read(self._base.nodes[name])
                two: Any = read(now.nodes[name])
                as_many = isinstance(one, Tensor) and (one.numel() == leaf.numel() or leaf.dtype == torch.bool)
                if as_many and not (isinstance(two, Tensor) and equal(one, two)):
                    return True
        return False

    def _is_index(self, position: int) -> bool:
        """Whether an argument of whole numbers is used as indices or categories."""
        self._densities()
        leaves = [leaf.detach() if _is_tensor(leaf) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._spec)
        with isolated_run(0), pyro.validation_enabled(False), _Hold(self._values()), Recorder() as recorder:
            self._model(*args, **kwargs)
        return used_as_index(recorder, leaves[position])


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _mask_values(site: Mapping[str, Any]) -> Tensor | bool | None:
    mask = site_mask(site)
    return None if mask is None else mask.values


def _is_drawn(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _start(site: Mapping[str, Any]) -> Tensor:
    # Moderate values other than 0, at which a factor of a product would hide the other one.
    return site["fn"].sample() if site["fn"].support.is_discrete else init_to_uniform(site, radius=1.0)


def _differs(one: Tensor, two: Tensor) -> Tensor:
    return ~torch.isclose(one, two, rtol=1e-6, atol=1e-7, equal_nan=True)


def _sum_to(log_prob: Tensor, frames: Sequence[CondIndepStackFrame]) -> Tensor:
    """The sum over all dimensions but those of some plates."""
    depth = max(-frame.dim for frame in frames)
    log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + log_prob.shape)
    kept = [log_prob.dim() + frame.dim for frame in frames]
    others = [dim for dim in range(log_prob.dim()) if dim not in kept]
    log_prob = log_prob.sum(others) if others else log_prob
    return log_prob.expand([frame.size for frame in frames])
