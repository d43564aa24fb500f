"""Whether rows are alike: equal data give equal factors, and their order does not matter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_avi.inspection.structure import RowSet
from pyro_avi.sufficiency.couplings import gains, rows_of_gains
from pyro_avi.sufficiency.data import Leaf, grid_of
from pyro_avi.sufficiency.joint import Joint, Point

__all__ = ["are_alike", "are_exchangeable", "by_rows", "rearranged"]

_ROUNDING = 1e-9


def by_rows(values: Tensor, rows: Tensor, order: Tensor) -> Tensor:
    """Values whose rows are taken from other rows; the same values where rows have different numbers of elements.

    Args:
        values: any tensor.
        rows: the number of the row of each element.
        order: ``[N]`` from where each row is taken.
    """
    flat = rows.flatten()
    sort, count = flat.argsort(stable=True), len(order)
    if flat.numel() % count:
        return values
    members = sort.view(count, -1)
    result = values.flatten().clone()
    result[members.flatten()] = values.flatten()[members[order].flatten()]
    return result.view(values.shape)


def rearranged(joint: Joint, point: Point, rows: RowSet, order: Tensor) -> Point:
    """A point whose rows of one set, with their data, are those at other positions.

    Args:
        joint: of the call.
        point: the point.
        rows: the set.
        order: ``[N]`` from where each row is taken.
    """
    latents = dict(point.latents)
    for other in joint.row_sets:
        groups = _projected(other, rows)
        if groups is not None:
            for latent in other.latents:
                places = groups[joint.rows[latent.name] - joint.rows_of(other).start]
                latents[latent.name] = by_rows(latents[latent.name], places, order)
    return Point(latents, _rearranged_data(joint.leaves, point.data, rows.plates, order), point.seed)


def _projected(other: RowSet, rows: RowSet) -> Tensor | None:
    """``[M]`` the row of a set that each row of another one lies in; ``None`` if it lacks one of its plates."""
    if not set(rows.plates) <= set(other.plates):
        return None
    sizes = [frame.size for frame in other.frames]
    return grid_of(sizes, [other.plates.index(name) for name in rows.plates]).flatten()


def _rearranged_data(leaves: Sequence[Leaf], data: Sequence[Tensor], plates, order: Tensor) -> list[Tensor]:
    values = []
    for leaf, value in zip(leaves, data, strict=True):
        groups = leaf.rows_in(plates)
        if groups is None or int(groups.max()) + 1 != len(order):
            values.append(value)
        else:
            values.append(by_rows(value, groups[leaf.cells], order))
    return values


def are_alike(joint: Joint, point: Point, rows: RowSet, *, before: int = 0, after: int = 0) -> bool:
    """Whether rows with equal latents and data have equal gains; otherwise something besides the data tells rows apart.

    Where a series has more or fewer values than rows, its rows cannot be made equal, and are taken to be alike.

    Args:
        joint: of the call.
        point: any point.
        rows: the set.
        before, after: how many rows at the start and end may differ.
    """
    own = joint.rows_of(rows)
    count = own.stop - own.start
    groups = [leaf.rows_in(rows.plates) for leaf in joint.leaves]
    if any(each is not None and int(each.max()) + 1 != count for each in groups):
        return True
    point = rearranged(joint, point, rows, torch.full((count,), count // 2))
    for part, places in zip(gains(joint, point)[0], rows_of_gains(joint), strict=True):
        inside = (places >= own.start + before) & (places < own.stop - after)
        if not inside.any():
            continue
        order = places[inside].argsort(stable=True)
        by_row = part[inside][order].view(count - before - after, -1)
        if float((by_row - by_row[:1]).abs().max()) > _ROUNDING * max(1.0, float(by_row.abs().max())):
            return False
    return True


def are_exchangeable(joint: Joint, point: Point, rows: RowSet) -> bool:
    """Whether the order of the rows, each with its data, leaves the log joint as it is.

    Args:
        joint: of the call.
        point: any point.
        rows: the set.
    """
    own = joint.rows_of(rows)
    order = torch.randperm(own.stop - own.start)
    one, two = joint(point), joint(rearranged(joint, point, rows, order))
    return bool((one - two).abs() <= _ROUNDING * max(1.0, float(one.abs())))
