"""Draws from the factors of rows, weighed until it is known whether they are good enough."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.estimators import iwelbo, khat

__all__ = ["LEAST_DRAWS", "Need", "Weighed", "weigh"]

#: The fewest draws whose tail is fitted. So many of every row are weighed first, then of rows that are still open four times
#: as many in all, and so on.
LEAST_DRAWS, _TIMES = 25, 4
# Weights of which so many draws are effective have no tail to speak of, whatever the index of their largest says.
_EVEN = 0.9
# Limits of an estimated gap, which one row in twenty is beyond, in standard errors.
_SCORE = 1.645
# The index above which no number of weights is trusted.
_HEAVY = 0.7


class Need(NamedTuple):
    """What is good enough: options of :func:`~pyro_avi.escalate` by the same names."""

    tolerance: float
    num_samples: int
    min_ess: int


class Weighed(NamedTuple):
    """Draws from a factor of every row, and what their weights say.

    Attributes:
        u: ``[S, B, K]``.
        weights: ``[S, B]``, the same for all draws that are good enough as they are; 0 for draws that were not weighed.
        plain: ``[B]`` whether they are good enough as they are.
        met: ``[B]`` whether they are good enough so or by their weights.
        counts: ``[B]`` how many draws were weighed.
        elbo: ``[B]``.
        gap, evidence, evidence_se, khat, ess: ``[B]`` as in :class:`~pyro_avi.Escalation`.
    """

    u: Tensor
    weights: Tensor
    plain: Tensor
    met: Tensor
    counts: Tensor
    elbo: Tensor
    gap: Tensor
    evidence: Tensor
    evidence_se: Tensor
    khat: Tensor
    ess: Tensor


class _Look(NamedTuple):
    """What the draws so far say, ``[B]`` each."""

    plain: Tensor
    met: Tensor
    is_open: Tensor
    elbo: Tensor
    gap: Tensor
    evidence: Tensor
    evidence_se: Tensor
    khat: Tensor
    ess: Tensor


def weigh(
    posterior: Callable[[Tensor], TorchDistribution],
    log_joint: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    *,
    as_weights: Callable[[Tensor], LogWeights],
    need: Need,
    to_the_end: bool,
) -> Weighed:
    """Draws from factors, of every row as many of them weighed as it takes to know whether they are good enough.

    Args:
        posterior: the factors of given rows, batch shape ``[B]``, event shape ``[K]``.
        log_joint: of given rows at coordinates ``[C, B, K]``: ``[C, B]``.
        rows: ``[B]`` those to answer.
        as_weights: what makes log weights of numbers ``[S, B]``.
        need: what is good enough.
        to_the_end: whether all draws are weighed of rows for which those so far promise nothing.
    """
    size, u = need.num_samples, posterior(rows).rsample((need.num_samples,))
    # Draws that are not weighed have weight zero.
    local = u.new_full(u.shape[:2], -torch.inf, dtype=torch.double)
    left, count = torch.arange(len(rows), device=rows.device), 0
    counts, looks = torch.zeros_like(left), None
    while len(left):
        upto = min(max(LEAST_DRAWS, _TIMES * count), size)
        points, those = u[count:upto, left], rows[left]
        local[count:upto, left] = log_joint(those, points) - posterior(those).log_prob(points).double()
        look = _look(as_weights(local[:upto, left]), need)
        looks = (
            look
            if looks is None
            else _Look(*(old.index_copy(0, left, new) for old, new in zip(looks, look, strict=True)))
        )
        counts[left] = count = upto
        if count == size:
            break
        left = left[~look.met & (look.is_open | to_the_end)]
    assert looks is not None
    told = {name: value for name, value in looks._asdict().items() if name != "is_open"}
    return Weighed(u=u, weights=torch.where(looks.plain, 1 / size, local.softmax(0)), counts=counts, **told)


def _look(weights: LogWeights, need: Need) -> _Look:
    local = weights.local
    count, size = len(local), need.num_samples
    tails, bound = khat(weights), iwelbo(weights)
    ess, bound_se = tails.ess, bound.rows_se
    assert ess is not None and bound_se is not None
    even = ess >= _EVEN * count
    # Over the number of draws: what the bound of so many lacks of the evidence.
    lacks = (count / ess - 1) / 2
    plain_gap = bound.rows - local.mean(0) + lacks / count
    plain_se = (count * local.softmax(0) - 1 - local).std(0) / count**0.5
    trusted = ~tails.unreliable | even
    plain = trusted & (plain_gap + _SCORE * plain_se <= need.tolerance)
    met = plain | trusted & (lacks / count <= need.tolerance) & (ess >= need.min_ess)
    # What more draws may show.
    may_be_plain = plain_gap - _SCORE * plain_se <= need.tolerance
    may_be_enough = (lacks / size <= need.tolerance) & (ess * size / count >= need.min_ess)
    is_open = (may_be_plain | may_be_enough) & ((tails.rows <= _HEAVY) | even)
    return _Look(
        plain,
        met,
        is_open,
        elbo=local.mean(0),
        gap=torch.where(plain, plain_gap, lacks / count),
        evidence=bound.rows,
        evidence_se=bound_se,
        khat=tails.rows,
        ess=torch.where(plain, float(size), ess),
    )
