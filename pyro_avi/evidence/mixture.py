"""Importance sampling from a mixture of factors and the prior, which finds modes that no single factor covers."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.densities.log_weights import LogWeights

__all__ = ["missed_modes", "mixture_weights"]

# A draw is in another mode if, from the center of the best factor to the draw, the log density of the factors falls by more
# than this many nats, and that of the model by less than this share of it. Within one mode both fall about as much.
_FAR, _FLATTER = 5.0, 0.1


@torch.no_grad()
def mixture_weights(
    joint: LocalJoint, factors: Sequence[TorchDistribution], *, num_samples: int, max_memory: int
) -> LogWeights:
    r"""Log weights of draws from a mixture of factors and the prior, as many from each.

    .. math:: w = \frac{p(x_n, z)}{\frac 1 C \left( p(z) + \sum_{c=1}^{C-1} q_c(z) \right)}

    A draw is weighted by the density of the whole mixture, whichever component it is from. The mean weight is an unbiased
    estimate of the evidence, and no weight is more than ``C`` times the weight under any one component. As the prior is one
    of them, it is at most ``C`` times the likelihood: a mode of the posterior that no factor covers is reached by draws from
    the prior.

    Args:
        joint: the log joint of the model; a prior that cannot be sampled is left out.
        factors: batch shape ``[N]``, event shape ``[K]``, normalized.
        num_samples: the number of draws, rounded up to a multiple of ``C``.
        max_memory: in bytes, what the draws that are evaluated at a time may take.

    References:
        Owen and Zhou, "Safe and effective importance sampling", 2000, https://doi.org/10.1080/01621459.2000.10473909.
        Veach and Guibas, "Optimally combining sampling techniques for Monte Carlo rendering", 1995,
        https://doi.org/10.1145/218380.218498.
    """
    draws: list[Callable[[int], Tensor]] = [partial(_draw, factor) for factor in factors]
    with_prior = _can_draw_prior(joint)
    draws += [joint.prior_draws] if with_prior else []

    def weigh(u: Tensor) -> Tensor:
        prior, likelihood = joint(u)
        densities = [factor.log_prob(u).double() for factor in factors] + ([prior] if with_prior else [])
        weight = prior + likelihood - torch.stack(densities).logsumexp(0) + math.log(len(densities))
        # A draw whose likelihood is nan has weight zero, which can only lower the mean.
        return torch.where(weight.isnan(), -torch.inf, weight)

    sizes = joint.chunks(-(-num_samples // len(draws)), max_memory)
    local = torch.cat([weigh(draw(count)) for count in sizes for draw in draws])
    return LogWeights(local, local.new_zeros(len(local)), joint.scale, has_globals=False)


def _draw(factor: TorchDistribution, count: int) -> Tensor:
    return factor.rsample((count,))


@torch.no_grad()
def missed_modes(
    joint: LocalJoint, factors: Sequence[TorchDistribution], center: Tensor, *, num_samples: int, max_memory: int
) -> tuple[Tensor, Tensor]:
    """Modes that no factor covers, by draws from the prior: the most probable such draw ``[N, K]``, and which rows have one.

    Every draw is also tried at twice its distance from the prior's mean, for data that contradict the prior.

    Args:
        joint: the log joint of the model.
        factors: batch shape ``[N]``, event shape ``[K]``.
        center: ``[N, K]`` the center of the best of them.
        num_samples: the number of points.
        max_memory: in bytes, what the draws that are evaluated at a time may take.
    """

    def densities(u: Tensor) -> tuple[Tensor, Tensor]:
        prior, likelihood = joint(u)
        return prior + likelihood, torch.stack([factor.log_prob(u).double() for factor in factors]).logsumexp(0)

    place, (at_center, covered_at_center) = center, densities(center.unsqueeze(0))
    found = torch.zeros_like(at_center[0], dtype=torch.bool)
    most = torch.full_like(at_center[0], -torch.inf)
    if not _can_draw_prior(joint):
        return place, found
    draws = joint.prior_draws(-(-num_samples // 2))
    draws = torch.cat([draws, 2 * draws - draws.mean(0)])
    for u in draws.split(joint.chunks(len(draws), max_memory)):
        model, covered = densities(u)
        fall = covered_at_center - covered
        alone = (fall > _FAR) & (at_center - model < _FLATTER * fall)
        top = torch.where(alone, model, -torch.inf).max(0)
        better = top.values > most
        point = u.gather(0, top.indices[None, :, None].expand(1, *u.shape[1:]))[0]
        place = torch.where(better.unsqueeze(-1), point, place)
        most, found = torch.where(better, top.values, most), found | better
    return place, found


def _can_draw_prior(joint: LocalJoint) -> bool:
    try:
        return bool(joint.prior_draws(1).isfinite().all())
    except NotImplementedError:
        return False
