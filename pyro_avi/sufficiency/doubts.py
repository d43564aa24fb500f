"""Why a log joint's derivatives may not tell the whole truth about it."""

import math
from collections.abc import Iterator, Sequence

import torch

from pyro_avi.sufficiency.components import Reach
from pyro_avi.sufficiency.couplings import gains
from pyro_avi.sufficiency.joint import Joint, Point

__all__ = ["find_doubts"]

_STEP, _SAME, _ROUNDING = 1e-5, 1e-4, 1e-10
_SPLITS = 2


def find_doubts(joint: Joint, points: Sequence[Point], reach: Reach, at: int) -> Iterator[str]:
    """What speaks against a verdict from derivatives.

    Args:
        joint: of the call.
        points: random points.
        reach: what the rows of a set depend on by the derivatives.
        at: the number of the set.
    """
    first = points[0]
    if float((joint(first) - joint(Point(first.latents, first.data, seed=1))).abs()) > 0:
        yield "the model draws random numbers outside of sample sites"
        return
    if not _agrees(joint, first):
        yield "its gradient is not that of its log joint: values are detached or computed outside of torch"
        return
    if reach.data is None:
        return
    for one, two in zip(points, points[1 : 1 + _SPLITS], strict=False):
        if _is_tied(joint, one, two, reach, at):
            yield "rows are tied where no derivative says so, as by ranks, thresholds or rounding"
            return


def _agrees(joint: Joint, point: Point) -> bool:
    """Whether the difference of the log joint between two near points is what its gradient says."""
    gradient, values = gains(joint, point)
    directions = [torch.randn_like(value) for value in values]
    totals = []
    for sign in (-1, 1):
        near = {
            latent.name: value.detach() + sign * _STEP * direction
            for latent, value, direction in zip(joint.continuous, values, directions, strict=True)
        }
        totals.append(float(joint(Point({**point.latents, **near}, point.data, point.seed))))
    expected = sum(float((g * d).sum()) for g, d in zip(gradient, directions, strict=False))
    size = sum(float((g * d).abs().sum()) for g, d in zip(gradient, directions, strict=False))
    return abs((totals[1] - totals[0]) / (2 * _STEP) - expected) <= _SAME * max(1.0, size)


def _is_tied(joint: Joint, one: Point, two: Point, reach: Reach, at: int) -> bool:
    r"""Whether a difference of differences of the log joint, which is 0 for independent rows, is not.

    .. math:: \ell(z_S', y') - \ell(z_S', y) - \ell(z_S, y') + \ell(z_S, y)

    with the latents of half of the components S, and everything y that they do not depend on.
    """
    half = torch.rand(int(reach.components.max()) + 1) < 0.5
    chosen = half[reach.components]
    mine = torch.zeros(joint.num_rows, dtype=torch.bool)
    mine[joint.offsets[at] : joint.offsets[at + 1]] = chosen
    other_rows = torch.zeros(joint.num_rows, dtype=torch.bool)
    other_rows[joint.offsets[at] : joint.offsets[at + 1]] = ~chosen
    totals = []
    for moves_own in (False, True):
        for moves_others in (False, True):
            moved = (mine & moves_own) | (other_rows & moves_others)
            latents = dict(one.latents)
            for latent in joint.latents:
                here, there = one.latents[latent.name], two.latents[latent.name]
                latents[latent.name] = torch.where(moved[joint.rows[latent.name]].to(here.device), there, here)
            data = list(one.data)
            for place, (leaf, pairs) in enumerate(zip(joint.leaves, reach.data or [], strict=True)):
                if moves_others and leaf.is_float:
                    free = torch.ones(leaf.count, dtype=torch.bool)
                    free[pairs[1][chosen[pairs[0]]]] = False
                    others, value = leaf.exchanged(free), one.data[place]
                    data[place] = torch.where(free[leaf.cells].to(value.device), others.to(value.dtype), value)
            totals.append(joint(Point(latents, data, one.seed)))
    size = max(float(total.abs()) for total in totals)
    mixed = float(totals[3] - totals[2] - totals[1] + totals[0])
    # Data of other rows may lie where a density ends, which says nothing.
    return abs(mixed) > _ROUNDING * max(1.0, size) and math.isfinite(size)
