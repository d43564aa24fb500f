"""A check of a verdict by numbers: two rows that an inference function cannot tell apart, and what their factors ask for."""

import torch
from torch import Tensor

from pyro_avi.sufficiency.components import Reach, reach_of
from pyro_avi.sufficiency.couplings import find_couplings, gains, rows_of_gains
from pyro_avi.sufficiency.joint import Joint, Point
from pyro_avi.sufficiency.symmetry import by_rows

__all__ = ["gradient_difference"]

_DRAWS = 2


def gradient_difference(joint: Joint, at: int, *, transfer: bool, before: int = 0, after: int = 0) -> float:
    r"""How much the ELBO's gradients by the variational parameters of two rows differ that an encoder cannot tell apart.

    .. math:: \frac{\partial \mathrm{ELBO}}{\partial \nu_n} \ne \frac{\partial \mathrm{ELBO}}{\partial \nu_m}
              \quad \text{with } \nu_n = \nu_m, \; x_n = x_m

    The rows have the same data, variational parameters and noise; all other rows have random ones. At parameters given by
    any inference function of the row's data these gradients would have to be equal, whatever the other rows are, for all of
    them to vanish together.

    Args:
        joint: of a call.
        at: the number of a set of rows.
        transfer: whether the two rows are in different data sets with the same global latents, instead of in one.
        before, after: how many rows of data around its own the encoder reads.

    Returns:
        Relative to the largest gradient: 0 up to rounding where nothing is refuted.
    """
    points = [joint.point(seed) for seed in (101, 102)]
    reach = reach_of(joint, find_couplings(joint, points[:1]), at)
    rows, own = joint.row_sets[at], joint.rows_of(joint.row_sets[at])
    count = own.stop - own.start
    movable = all(leaf.rows_in(rows.plates) is not None for leaf in joint.leaves)
    alone = int((reach.labels == reach.labels[own.start]).sum()) == 1 or reach.coupled
    n, m = before + 1, count - after - 2
    if not (movable and alone):
        # Its data cannot be given to another row: it is compared with itself among other rows.
        if not transfer:
            return float("nan")
        m = n
    second = points[1] if transfer else points[0]
    second = _with_row(joint, points[0], second, at, n, m, reach, before, after)
    worst, size = 0.0, 0.0
    for draw in range(_DRAWS):
        one = _gradients(joint, points[0] if transfer else second, own.start + n, draw)
        two = _gradients(joint, second, own.start + m, draw)
        worst = max(worst, float((one - two).abs().max()))
        size = max(size, float(one.abs().max()), float(two.abs().max()))
    return worst / max(size, 1e-300)


def _gradients(joint: Joint, point: Point, row: int, draw: int) -> Tensor:
    """The gradients of the ELBO by the location and the logarithm of the scale of a row's latents, and its differences."""
    # The values of the other rows are draws already; the noise of this row is what matters.
    latents = dict(point.latents)
    moves: list[Tensor] = []
    for latent in joint.continuous:
        mine = joint.rows[latent.name] == row
        torch.default_generator.manual_seed(draw)
        value = latents[latent.name].clone()
        noise = 0.3 * torch.randn(int(mine.sum()), dtype=torch.double).to(value)
        value[mine] += noise
        latents[latent.name] = value
        moves.append(noise)
    found = gains(joint, Point(latents, point.data, point.seed))[0]
    parts = []
    for at, (part, rows) in enumerate(zip(found, rows_of_gains(joint), strict=True)):
        mine = part.detach()[rows == row].flatten().cpu()
        # By the logarithm of the scale: the noise times the gradient, and 1 from the entropy.
        parts += [mine, mine * moves[at].cpu() + 1] if at < len(moves) else [mine]
    return torch.cat(parts)


def _with_row(
    joint: Joint, first: Point, second: Point, at: int, n: int, m: int, reach: Reach, before: int, after: int
) -> Point:
    """The second point with the row ``m`` of the set as the row ``n`` of the first one, and the same global latents."""
    rows, own = joint.row_sets[at], joint.rows_of(joint.row_sets[at])
    count = own.stop - own.start
    latents = {**second.latents}
    inside, own_names = ({latent.name for latent in each} for each in (joint.latents, rows.latents))
    latents.update({name: value for name, value in first.latents.items() if name not in inside})
    for other in reach.crossed:
        latents.update({latent.name: first.latents[latent.name] for latent in joint.row_sets[other].latents})
    label = reach.labels[own.start + n]
    order = torch.arange(count)
    order[m] = n
    for latent in joint.latents:
        places = joint.rows[latent.name]
        if latent.name in own_names:
            value = by_rows(first.latents[latent.name], places - own.start, order)
            latents[latent.name] = torch.where((places == own.start + m).to(value.device), value, latents[latent.name])
        elif n == m and not reach.coupled:
            # What belongs to the row in other sets.
            value = first.latents[latent.name]
            mine = (reach.labels[places] == label).to(value.device)
            latents[latent.name] = torch.where(mine, value, latents[latent.name])
    window = torch.arange(-before, after + 1)
    order[m + window] = n + window
    data = []
    for position, (leaf, one, two) in enumerate(zip(joint.leaves, first.data, second.data, strict=True)):
        groups = leaf.rows_in(rows.plates)
        if groups is None:
            keep = torch.zeros(leaf.count, dtype=torch.bool)
            if reach.data is not None:
                keep[reach.data[position][1][reach.data[position][0] == n]] = True
            data.append(torch.where(keep[leaf.cells].to(one.device), one, two))
        else:
            read = torch.zeros(int(groups.max()) + 1, dtype=torch.bool)
            read[m + window] = True
            value = by_rows(one, groups[leaf.cells], order) if len(read) == count else one
            data.append(torch.where(read[groups[leaf.cells]].to(two.device), value, two))
    return Point(latents, data, first.seed)
