"""An estimate of how much the bounds of a table's rows may still rise, from their gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.factors.factor import Factor

__all__ = ["RemainingGain", "remaining_gain"]

# Groups of draws, each with a seed of its own, and how many pairs of mirror images a group has.
_GROUPS, _PAIRS = 10, 15
# Groups by which the curvature is measured, and how far away, in nats of divergence.
_FEW, _APART = 3, 0.005
# The lower bound of the curvature; the upper one is that of the factor itself.
_FLAT = 0.02


@dataclass(frozen=True)
class RemainingGain:
    """How much the bounds of rows may still rise, in nats.

    Attributes:
        rows: ``[N]`` estimates without bias, so that they may be below zero where nothing is left.
        rows_se: ``[N]`` their standard errors.
    """

    rows: Tensor
    rows_se: Tensor

    def at_most(self, score: float = 1.645) -> Tensor:
        """``[N]`` upper ends, which the gain of one row in twenty exceeds."""
        return self.rows.clamp(min=0.0) + score * self.rows_se

    def plus(self, rows: Tensor, rows_se: Tensor) -> "RemainingGain":
        """The sum with another ``[N]``, and its standard error."""
        return RemainingGain(self.rows + rows, torch.hypot(self.rows_se, rows_se))


def remaining_gain(joint: LocalJoint, factor: Factor, table: Tensor, *, seed: int, max_memory: int) -> RemainingGain:
    r"""How much the bounds of a table's rows may still rise, to second order.

    .. math:: \tfrac 1 2 g_n^\top F_n^{-1} g_n \, / \, r_n, \qquad r_n = \frac{d_n^\top H_n d_n}{d_n^\top F_n d_n}, \qquad
              d_n = F_n^{-1} g_n

    where :math:`g_n` is the gradient of a row's bound, :math:`F_n` the diagonal of the Fisher information of its factor, and
    :math:`H_n` the curvature of its bound, along the natural gradient :math:`d_n`: a step along :math:`d_n` of the best
    length gains as much. The square is taken over pairs of different groups of draws, so that their noise is none of it.
    In a curved valley the bound may rise further than this tells, and of other modes no gradient knows.

    Args:
        joint: of the model.
        factor: of the rows, continuous.
        table: ``[N, P]``.
        seed: of the draws.
        max_memory: in bytes, what the draws that are evaluated at a time may take.
    """
    table = table.detach()
    gradients, fisher = _gradients(joint, factor, table, _GROUPS, seed, max_memory)
    fisher = fisher.mean(0).clamp(min=1e-12)
    mean = gradients.mean(0)
    natural = mean / fisher
    length = (natural * mean).sum(-1, keepdim=True).clamp(min=1e-300)
    step = natural * (2 * _APART / length).sqrt()
    there, _ = _gradients(joint, factor, table + step.to(table), _FEW, seed, max_memory)
    curvature = ((gradients[:_FEW] - there).mean(0) * step).sum(-1) / (2 * _APART)
    curvature = curvature.nan_to_num(nan=_FLAT).clamp(_FLAT, 1.0)
    whole, count = gradients / fisher.sqrt(), len(gradients)
    total, squares = whole.sum(0), whole.square().sum(-1)
    rows = 0.5 * (total.square().sum(-1) - squares.sum(0)) / (count * (count - 1))
    # Leave-one-group-out estimates, for the jackknife.
    without = (total - whole).square().sum(-1) - (squares.sum(0) - squares)
    without = 0.5 * without / ((count - 1) * (count - 2))
    error = ((count - 1) * (without - without.mean(0)).square().mean(0)).sqrt()
    return RemainingGain(rows / curvature, error / curvature)


def _gradients(
    joint: LocalJoint, factor: Factor, table: Tensor, groups: int, seed: int, max_memory: int
) -> tuple[Tensor, Tensor]:
    """The gradient of the rows' bounds, and the diagonal of their factors' Fisher information, ``[groups, N, P]`` each."""
    gradients, fisher = [], []
    sizes = joint.chunks(_PAIRS, max_memory)
    for group in range(groups):
        gradient = information = torch.zeros_like(table, dtype=torch.double)
        with isolated_sampling(seed + group):
            for count in sizes:
                of_gradient, of_fisher = _gradient_sums(joint, factor, table, count)
                gradient, information = gradient + of_gradient / _PAIRS, information + of_fisher / _PAIRS
        gradients.append(gradient)
        fisher.append(information)
    return torch.stack(gradients), torch.stack(fisher)


def _gradient_sums(joint: LocalJoint, factor: Factor, table: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums over pairs of draws ``[N, P]``."""
    with torch.enable_grad():
        # One copy for each draw, so that gradients are by draw.
        copies = table.expand(count, *table.shape).clone().requires_grad_()
        posterior = factor.distribution(copies)
        u = posterior.rsample()
        points, density = [u], posterior
        if factor.family.symmetric:
            # The gradient of the path alone has no noise where the factor is the posterior.
            points, density = [u, 2 * posterior.mean - u], factor.distribution(table)
        gradient = fisher = torch.zeros_like(table, dtype=torch.double)
        for point in points:
            prior, likelihood = joint(point)
            weight = prior + likelihood - density.log_prob(point).double()
            (of_point,) = torch.autograd.grad(weight.sum(), copies, retain_graph=True)
            (score,) = torch.autograd.grad(posterior.log_prob(point.detach()).sum(), copies, retain_graph=True)
            gradient = gradient + of_point.double().sum(0) / len(points)
            fisher = fisher + score.double().square().sum(0) / len(points)
    return gradient, fisher
