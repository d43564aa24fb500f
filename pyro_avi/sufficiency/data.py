"""The data of a call: the tensors that its rows may read, and which of their elements belong together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path

from pyro_avi.encoder_inputs.arguments import argument_at
from pyro_avi.inspection.sites import equal, is_observation, site_frames

__all__ = ["Leaf", "find_leaves", "grid_of"]

# A series may be passed with some of its values before the first row or after the last one.
_MARGIN = 3


@dataclass(frozen=True)
class Leaf:
    """A tensor of data.

    Attributes:
        name: of the observed site that it is, or else of the argument.
        value: its elements.
        position: among the arguments; ``None`` for an observed value that is none of them.
        plates: the plates whose rows its elements are numbered by.
        sizes: the number of rows of each.
        cells: ``value.shape`` the number of each element's combination of rows.
        is_argument: whether it is no observed value, but an argument beside them.
    """

    name: str
    value: Tensor
    position: int | None
    plates: tuple[str, ...]
    sizes: tuple[int, ...]
    cells: Tensor
    is_argument: bool

    @property
    def count(self) -> int:
        """The number of combinations of rows."""
        return torch.Size(self.sizes).numel()

    @property
    def is_float(self) -> bool:
        """Whether derivatives by it exist."""
        return self.value.is_floating_point()

    def rows_in(self, plates: Sequence[str]) -> Tensor | None:
        """``[count]`` the row of given plates that each combination belongs to; ``None`` where it lacks one of them."""
        if not set(plates) <= set(self.plates):
            return None
        return grid_of(self.sizes, [self.plates.index(name) for name in plates]).flatten()

    def exchanged(self, cells: Tensor) -> Tensor:
        """The values with other rows' in the place of those of some combinations ``[count]``."""
        others = self.value.clone()
        for step in range(1, min(self.count, 64)):
            moved = self._shifted(step)
            others = torch.where(equal_elements(others, self.value), moved, others)
        same = equal_elements(others, self.value).all()
        if same and self.value.dtype == torch.bool:
            others = ~self.value
        elif same:
            others = self.value + 1
        return torch.where(cells[self.cells].to(others.device), others, self.value)

    def _shifted(self, step: int) -> Tensor:
        """The values of the rows that follow by some steps, along the plate with the most rows."""
        dim = max(range(len(self.sizes)), key=lambda at: self.sizes[at])
        inner = torch.Size(self.sizes[dim + 1 :]).numel()
        first = self.cells.flatten()
        along = (first // inner) % self.sizes[dim]
        target = first + ((along + step) % self.sizes[dim] - along) * inner
        order = first.argsort(stable=True)
        rank = torch.empty_like(order)
        width = len(first) // self.count
        rank[order] = torch.arange(len(first)) % width
        return self.value.flatten()[order[target * width + rank]].view(self.value.shape)


def equal_elements(one: Tensor, two: Tensor) -> Tensor:
    """Which elements are the same, missing ones included."""
    return (one == two) | (one.isnan() & two.isnan()) if one.is_floating_point() else one == two


def grid_of(shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """The number of each element's combination of positions along some dimensions, the first one slowest."""
    cells = torch.zeros(tuple(shape), dtype=torch.long)
    for dim in dims:
        cells = cells * shape[dim] + torch.arange(shape[dim]).view([-1 if at == dim else 1 for at in range(len(shape))])
    return cells


def find_leaves(
    model: Callable, args: tuple, kwargs: Mapping[str, Any], trace: Trace, plates: Sequence[str], fixed: Sequence[str]
) -> list[Leaf]:
    """The tensors that may differ from one data set to the next: arguments with rows, and observed values.

    Args:
        model, args, kwargs: the call.
        trace: of the model, its observed values that follow arguments with gradients.
        plates: of the rows.
        fixed: the names of arguments that are no data.

    Raises:
        ValueError: if there is no argument of such a name.
    """
    paths, _ = tree_flatten_with_path((args, dict(kwargs)))
    names = [argument_at(model, path).name for path, _ in paths]
    if unknown := set(fixed) - {name for name, (_, leaf) in zip(names, paths, strict=True) if isinstance(leaf, Tensor)}:
        raise ValueError(f"Expected structure= to name tensor arguments among {names}, got {sorted(unknown)}.")
    frames = {frame.name: frame for site in trace.nodes.values() for frame in site_frames(site)}
    chosen = [frames[name] for name in plates]
    others = [frame for name, frame in frames.items() if name not in plates]
    observed = {name: site for name, site in trace.nodes.items() if is_observation(site)}
    found: list[Leaf] = []
    named: set[str] = set()
    for position, (name, (_, leaf)) in enumerate(zip(names, paths, strict=True)):
        if not isinstance(leaf, Tensor) or name in fixed:
            continue
        left = {each: observed[each]["value"] for each in observed if each not in named}
        site = next((each for each, value in left.items() if equal(leaf.detach(), _plain(value, leaf))), None)
        dims = None if site is None else _dims_of_site(observed[site], leaf, plates)
        if not dims:
            dims = _dims_by_size(leaf, chosen, others, is_observed=site is not None)
        if site is not None:
            named.add(site)
        if dims:
            found.append(_leaf(site or name, leaf, position, dims, is_argument=site is None))
    for name, site in observed.items():
        if name not in named and not site["value"].requires_grad:
            value = site["value"]
            if dims := _dims_of_site(site, value, plates) or _dims_by_size(value, chosen, others, is_observed=True):
                found.append(_leaf(name, value, None, dims, is_argument=False))
    return found


def _plain(value: Tensor, like: Tensor) -> Tensor:
    value = value.detach()
    return value.to(like.dtype) if value.is_floating_point() and like.is_floating_point() else value


def _leaf(name, value, position, dims: Mapping[str, int], *, is_argument: bool) -> Leaf:
    sizes = tuple(value.shape[dim] for dim in dims.values())
    cells = grid_of(value.shape, list(dims.values()))
    return Leaf(name, value.detach(), position, tuple(dims), sizes, cells, is_argument)


def _dims_of_site(site: Mapping[str, Any], value: Tensor, plates: Sequence[str]) -> dict[str, int]:
    """The dimensions of an observed value by plate: of the plates of the rows, or else of its own."""
    frames = sorted(site_frames(site), key=lambda frame: frame.dim)
    frames = [frame for frame in frames if frame.name in plates] or frames
    dims = {frame.name: value.dim() + frame.dim - site["fn"].event_dim for frame in frames}
    return {name: dim for name, dim in dims.items() if dim >= 0 and value.shape[dim] > 1}


def _dims_by_size(
    leaf: Tensor, chosen: Sequence[CondIndepStackFrame], others: Sequence[CondIndepStackFrame], *, is_observed: bool
) -> dict[str, int]:
    """The dimensions of an argument by plate, told by their sizes; none where it is no data."""
    if not is_observed and leaf.dim() >= 2:
        square = any(list(leaf.shape).count(frame.size) > 1 for frame in chosen)
        if square or leaf.is_floating_point() and _is_one_hot(leaf):
            return {}
    for frames, margin in ((chosen, 0), (others, 0), (chosen, _MARGIN)):
        dims: dict[str, int] = {}
        for frame in sorted(frames, key=lambda frame: frame.dim):
            free = [dim for dim in range(leaf.dim()) if dim not in dims.values() and leaf.shape[dim] > 1]
            sizes = {frame.size, frame.full_size}
            fits = [dim for dim in free if any(abs(leaf.shape[dim] - size) <= margin for size in sizes)]
            if fits:
                dims[frame.name] = fits[0]
        if dims:
            return dims
    return {}


def _is_one_hot(leaf: Tensor) -> bool:
    return bool(((leaf == 0) | (leaf == 1)).all() and (leaf.sum(-1) == 1).all())
