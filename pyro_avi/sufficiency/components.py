"""Rows that are coupled by way of others, and the data that enter a row's factor by way of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.sufficiency.couplings import Couplings
from pyro_avi.sufficiency.joint import Joint
from pyro_avi.sufficiency.patterns import TooIrregularError

__all__ = ["Reach", "reach_of"]

_MOST_PAIRS = 5_000_000


@dataclass(frozen=True)
class Reach:
    """What the factors of one set of rows depend on.

    Attributes:
        components: ``[N]`` the component of each row.
        coupled: whether a component holds several rows of the set.
        data: by leaf ``[2, E]`` the pairs of rows of the set and combinations of its rows; ``None`` if the set is
            one component.
        labels: ``[R]`` the component of the rows of all sets.
        crossed: the numbers of the sets of rows that are refitted with the global latents.
    """

    components: Tensor
    coupled: bool
    data: list[Tensor] | None
    labels: Tensor
    crossed: tuple[int, ...]


def reach_of(joint: Joint, couplings: Couplings, at: int) -> Reach:
    """What the factors of one set of rows depend on.

    Latents are followed to those of the same set and of sets that are nested with it: whose rows are each coupled with one of
    its rows at most, or the other way round. Any others are crossed with it and belong to all of its rows.

    Args:
        joint: of the call.
        couplings: its couplings.
        at: the number of the set.

    Raises:
        TooIrregularError: if the data follow no rule, and the rows are too many to look at each.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, two = couplings.latents
    sets = torch.bucketize(torch.arange(joint.num_rows), torch.tensor(joint.offsets[1:]), right=True)
    inside = _nested(sets, one, two, at, len(joint.row_sets))
    kept = inside[sets[one]] & inside[sets[two]]
    shape = (joint.num_rows, joint.num_rows)
    graph = coo_array((torch.ones(int(kept.sum())).numpy(), (one[kept].numpy(), two[kept].numpy())), shape=shape)
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    own = slice(joint.offsets[at], joint.offsets[at + 1])
    components = labels[own]
    coupled = len(components.unique()) < len(components)
    one_component = coupled and len(components.unique()) == 1
    data = None
    if not one_component:
        data = []
        for pairs in couplings.data:
            if pairs is None:
                raise TooIrregularError
            data.append(_followed(pairs[:, inside[sets[pairs[0]]]], labels, own))
    crossed = [other for other in range(len(joint.row_sets)) if not bool(inside[other])]
    crossed = [o for o in crossed if bool(((sets[one] == at) & (sets[two] == o)).any())]
    return Reach(components, coupled, data, labels, tuple(crossed))


def _nested(sets: Tensor, one: Tensor, two: Tensor, at: int, count: int) -> Tensor:
    """``[sets]`` which are nested with one of them, directly or by way of others."""
    inside, pending = torch.arange(count) == at, [at]
    while pending:
        here = pending.pop()
        for other in range(count):
            between = (sets[one] == here) & (sets[two] == other)
            # A set of one row is shared by all, as a global latent is.
            if inside[other] or not between.any() or bool((sets == other).sum() == 1):
                continue
            pairs = torch.stack([one[between], two[between]]).unique(dim=1)
            most = [int(rows.unique(return_counts=True)[1].max()) for rows in pairs]
            if min(most) == 1:
                inside[other] = True
                pending.append(other)
    return inside


def _followed(pairs: Tensor, labels: Tensor, own: slice) -> Tensor:
    """The pairs of the rows of a set and all data that enter anywhere in their components."""
    components = torch.stack([labels[pairs[0]], pairs[1]]).unique(dim=1)
    rows = torch.arange(own.stop - own.start)
    mine = labels[own]
    order = mine.argsort(stable=True)
    members = torch.bincount(mine, minlength=int(labels.max()) + 1)
    first = members.cumsum(0) - members
    repeats = members[components[0]]
    if int(repeats.sum()) > _MOST_PAIRS:
        raise TooIrregularError
    starts = first[components[0]].repeat_interleave(repeats)
    within = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    return torch.stack([rows[order[starts + within]], components[1].repeat_interleave(repeats)])
