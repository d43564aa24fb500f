"""Which rows' latents are coupled, and which data enter their factors: the sparsity of the log joint's second derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.sufficiency.joint import Joint, Point
from pyro_avi.sufficiency.patterns import Block, TooIrregularError, find_pairs

__all__ = ["Couplings", "changed_rows", "find_couplings", "gains", "rows_of_gains"]

# Relative to the largest derivative on the diagonal.
_TOLERANCE = 1e-11
# Rows with discrete latents are changed one at a time.
_MOST_DISCRETE, _POINTS_OF_DISCRETE = 64, 2


@dataclass(frozen=True)
class Couplings:
    """What depends on what.

    Attributes:
        latents: ``[2, E]`` pairs of rows whose latents a term of the log joint ties, through all sets of rows.
        data: by leaf ``[2, E]`` the pairs of rows and combinations of its rows of which that holds; ``None`` where they
            follow no rule and are too many.
    """

    latents: Tensor
    data: list[Tensor | None]


@torch.enable_grad()
def gains(joint: Joint, point: Point, *, graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """What a row's factor is fitted by: how the log joint changes with the row's latents.

    Of a continuous latent this is the gradient, in the shape of the latent; of the discrete latents of a row together the
    difference that another value makes, in the last tensor ``[R]``.

    Args:
        joint: of a call.
        point: where.
        graph: whether it is to be differentiated again.

    Returns:
        These, and the values of the continuous latents that they may be differentiated by.
    """
    leaves = [point.latents[latent.name].detach().clone().requires_grad_() for latent in joint.continuous]
    values = {latent.name: leaf for latent, leaf in zip(joint.continuous, leaves, strict=True)}
    point = Point({**point.latents, **values}, point.data, point.seed)
    total = joint(point)
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if leaves and total.requires_grad:
        found = torch.autograd.grad(total, leaves, create_graph=graph, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, found, strict=True)]
    differences = torch.zeros(joint.num_rows, dtype=torch.double)
    for row in joint.rows_with_discrete():
        moved = joint.moved(point, torch.arange(joint.num_rows) == row)
        differences = differences.index_add(0, torch.tensor([row]), (joint(moved) - total).reshape(1).cpu())
    return [*parts, differences if graph else differences.detach()], leaves


def rows_of_gains(joint: Joint) -> list[Tensor]:
    """The rows that the elements of :func:`gains` belong to."""
    return [*(joint.rows[latent.name] for latent in joint.continuous), torch.arange(joint.num_rows)]


class _Derivatives:
    """Second derivatives at several points, read for some rows at a time."""

    def __init__(self, joint: Joint, points: Sequence[Point]):
        self._joint = joint
        self._graphs = [self._graph(point) for point in points]

    def _graph(self, point: Point):
        joint = self._joint
        data = [value.clone().requires_grad_() if value.is_floating_point() else value for value in point.data]
        gradient, latents = gains(joint, Point(point.latents, data, point.seed), graph=True)
        scale = max(float(part.detach().abs().max()) for part in gradient)
        return gradient, latents, data, scale

    def read(self, chosen: Tensor) -> Tensor:
        """``[L, R + cells]`` which rows and data the gradient of chosen rows ``[L, R]`` depends on at some point."""
        joint = self._joint
        size = joint.num_rows + sum(leaf.count for leaf in joint.leaves)
        found = torch.zeros(len(chosen), size, dtype=torch.bool)
        for gradient, latents, data, scale in self._graphs:
            responses = torch.stack([self._response(gradient, latents, data, each, size) for each in chosen])
            largest = max(scale, float(responses[:, : joint.num_rows].max()))
            found |= responses > _TOLERANCE * largest
        return found

    @torch.enable_grad()
    def _response(self, gradient, latents, data, chosen: Tensor, size: int) -> Tensor:
        joint, response = self._joint, torch.zeros(size, dtype=torch.double)
        total = torch.zeros((), dtype=torch.double)
        for rows, part in zip(rows_of_gains(joint), gradient, strict=True):
            total = total + (part * chosen[rows].to(part.device) * (0.5 + torch.rand_like(part))).sum()
        inputs = [*latents, *(value for value in data if value.requires_grad)]
        if not total.requires_grad:
            return response
        derivatives = iter(torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True))
        for latent in joint.continuous:
            _raise_to(response, joint.rows[latent.name], next(derivatives))
        start = joint.num_rows
        for leaf, value in zip(joint.leaves, data, strict=True):
            if value.requires_grad and (derivative := next(derivatives)) is not None:
                size_of_values = value.detach().abs().clamp(min=float(value.detach().abs().mean()) + 1e-6)
                _raise_to(response, leaf.cells + start, derivative * size_of_values)
            start += leaf.count
        return response


def _raise_to(response: Tensor, places: Tensor, derivative: Tensor | None) -> None:
    if derivative is not None:
        response.scatter_reduce_(0, places.flatten(), derivative.detach().abs().flatten().cpu(), "amax")


def find_couplings(joint: Joint, points: Sequence[Point]) -> Couplings:
    """The couplings of a call: the union over several random points, as a derivative may vanish at one of them.

    Args:
        joint: of the call.
        points: where its derivatives are taken.

    Raises:
        TooIrregularError: if rows are coupled by no rule, and too many to look at each.
    """
    if len(joint.rows_with_discrete()) > _MOST_DISCRETE:
        raise TooIrregularError
    # Differences see more than derivatives at a point, and take longer.
    points = points[:_POINTS_OF_DISCRETE] if joint.discrete else points
    derivatives = _Derivatives(joint, points)
    pairs: list[Tensor] = []
    data: list[list[Tensor | None]] = [[] for _ in joint.leaves]
    for rows in joint.row_sets:
        own = joint.rows_of(rows)
        count = own.stop - own.start

        def respond(chosen: Tensor, own: slice = own) -> Tensor:
            every = torch.zeros(len(chosen), joint.num_rows, dtype=torch.bool)
            every[:, own] = chosen
            return derivatives.read(every)

        found = find_pairs(respond, count, _blocks(joint, rows.plates, own))
        for other, each in zip(joint.row_sets, found, strict=False):
            if each is None:
                raise TooIrregularError
            pairs.append(each + torch.tensor([[own.start], [joint.rows_of(other).start]]))
        if joint.discrete:
            pairs.append(_by_moves(joint, points[:2], own))
        for at, (leaf, each) in enumerate(zip(joint.leaves, found[len(joint.row_sets) :], strict=True)):
            if not leaf.is_float:
                each = _by_exchange(joint, points[:2], at, rows.plates, own)
            data[at].append(None if each is None else each + torch.tensor([[own.start], [0]]))
    by_leaf = []
    for parts in data:
        known = [part for part in parts if part is not None]
        by_leaf.append(torch.cat(known, 1) if len(known) == len(parts) else None)
    return Couplings(torch.cat(pairs, 1), by_leaf)


def _blocks(joint: Joint, plates: tuple[str, ...], own: slice) -> list[Block]:
    blocks = []
    for other in joint.row_sets:
        place = joint.rows_of(other)
        rows = torch.arange(own.stop - own.start) if place == own else None
        blocks.append(Block(place.start, place.stop, rows, connects=place == own))
    start = joint.num_rows
    for leaf in joint.leaves:
        blocks.append(Block(start, start + leaf.count, leaf.rows_in(plates)))
        start += leaf.count
    return blocks


def _responses(
    joint: Joint, points: Sequence[Point], change: Callable[[Point, Tensor], Point], own: slice
) -> Callable[[Tensor], Tensor]:
    """A function from what is changed, ``[L, count]`` booleans, to the rows of a set whose gains change."""
    before = [gains(joint, point)[0] for point in points]

    def respond(chosen: Tensor) -> Tensor:
        found = torch.zeros(len(chosen), joint.num_rows, dtype=torch.bool)
        for row, each in enumerate(chosen):
            for point, old in zip(points, before, strict=True):
                try:
                    new = gains(joint, change(point, each))[0]
                except (RuntimeError, IndexError, ValueError):
                    # Numbers that the model cannot be called with say nothing.
                    continue
                found[row] |= changed_rows(joint, old, new)
        return found[:, own]

    return respond


def _by_moves(joint: Joint, points: Sequence[Point], own: slice) -> Tensor:
    """The pairs of rows of a set and of all rows with discrete latents that they are coupled with."""
    rows = torch.tensor(joint.rows_with_discrete())

    def moved(point: Point, chosen: Tensor) -> Point:
        return joint.moved(point, torch.zeros(joint.num_rows, dtype=torch.bool).index_fill(0, rows[chosen], True))

    block = Block(0, own.stop - own.start, None)
    found = find_pairs(_responses(joint, points, moved, own), len(rows), [block])[0]
    if found is None:
        raise TooIrregularError
    sources, targets = found
    return torch.stack([targets + own.start, rows[sources]])


def _by_exchange(joint: Joint, points: Sequence[Point], at: int, plates: tuple[str, ...], own: slice) -> Tensor | None:
    """The pairs of rows and combinations of a leaf without derivatives: some of its rows' values are exchanged for others'."""
    leaf = joint.leaves[at]
    groups = leaf.rows_in(plates)
    groups = torch.arange(leaf.count) if groups is None else groups

    def exchanged(point: Point, chosen: Tensor) -> Point:
        data = list(point.data)
        data[at] = leaf.exchanged(chosen[groups])
        return Point(point.latents, data, point.seed)

    count = int(groups.max()) + 1
    rows = torch.arange(own.stop - own.start)
    block = Block(0, len(rows), rows if count == len(rows) else None)
    found = find_pairs(_responses(joint, points, exchanged, own), count, [block])[0]
    if found is None:
        return None
    sources, targets = found
    # Every combination of a row that was exchanged.
    order = groups.argsort(stable=True)
    width = len(groups) // count
    cells = order.view(count, width)[sources]
    return torch.stack([targets[:, None].expand_as(cells).flatten(), cells.flatten()])


def changed_rows(joint: Joint, old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
    """``[R]`` whose gradient differs beyond rounding."""
    response = torch.zeros(joint.num_rows, dtype=torch.double)
    for rows, one, two in zip(rows_of_gains(joint), old, new, strict=True):
        _raise_to(response, rows, two - one)
    scale = max(max(float(part.abs().max()) for part in parts) for parts in (old, new))
    return response > _TOLERANCE * max(scale, 1e-300)
