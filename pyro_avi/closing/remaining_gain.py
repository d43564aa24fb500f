"""An estimate of how much the bounds of a table's rows may still rise, from their gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.factors.factor import Factor

__all__ = ["GainOfSteps", "RemainingGain", "remaining_gain"]

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

    def times(self, factor: float | Tensor) -> "RemainingGain":
        """The same a number of times."""
        return RemainingGain(factor * self.rows, factor * self.rows_se)

    def least(self, other: "RemainingGain") -> "RemainingGain":
        """For every row the one with the lower upper end."""
        own = self.at_most() <= other.at_most()
        return RemainingGain(torch.where(own, self.rows, other.rows), torch.where(own, self.rows_se, other.rows_se))

    def plus(self, rows: Tensor, rows_se: Tensor) -> "RemainingGain":
        """The sum with another ``[N]``, and its standard error."""
        return RemainingGain(self.rows + rows, torch.hypot(self.rows_se, rows_se))


class GainOfSteps:
    r"""The same from the gradients of steps of refinement, each by two draws, without one evaluation more.

    .. math:: \tfrac 1 2 \left( \bar a_n^\top \bar b_n + \kappa v_n \right) / \, r_n, \qquad
              \kappa = K^{-2} \sum_{s \le K} (1 - d_s), \qquad d_1 = 1, \; d_{s+1} = d_s (1 - \alpha_s)

    at the mean of a row's parameters before each of ``K`` steps, where :math:`\bar a_n, \bar b_n` are the means over them
    of the gradient by one draw and by the other, in units of the Fisher information, and :math:`v_n` the variance of one.
    Noise of the two draws is independent. But a step that has followed noise at a share :math:`\alpha` of the gradient is
    answered by the next ones, which turns the product down: on average by :math:`\kappa v_n` where the bound is as curved as
    the factor says, by less where it is flatter. How curved it is, :math:`r_n`, tells the change of a gradient by one draw
    along the mean gradient.
    """

    def __init__(self) -> None:
        self._sums: Any = 0.0
        self._noise: Any = 0.0
        self._count, self._decay, self._decays = 0, 1.0, 0.0

    def add(self, gradients: Tensor, fisher: Tensor, rate: float) -> None:
        """Count a step.

        Args:
            gradients: ``[2, N, P]`` by draw.
            fisher: ``[N, P]`` the diagonal of the Fisher information.
            rate: the share of the natural gradient that the step goes.
        """
        whole = gradients.double() * fisher.double().rsqrt()
        self._sums = self._sums + whole
        self._noise = self._noise + 0.5 * (whole[0] - whole[1]).square()
        self._count += 1
        self._decays += self._decay
        self._decay *= 1 - min(max(rate, 0.0), 1.0)

    def of(self, rows: Tensor) -> "GainOfSteps":
        """The same of some rows ``[B]``."""
        some = GainOfSteps()
        some.__dict__.update(self.__dict__)
        some._sums, some._noise = self._sums[:, rows], self._noise[rows]
        return some

    @property
    def decay(self) -> float:
        """The mean over the steps of the share of a first gradient that is left, where the bound is as curved as its factor."""
        return self._decays / self._count

    def move(self, fisher: Tensor) -> Tensor:
        """``[N, P]`` a short way along the mean natural gradient of the loss, down.

        Args:
            fisher: ``[N, P]`` where it starts.
        """
        whole = self._sums.mean(0)
        length = whole.norm(dim=-1, keepdim=True).clamp(min=1e-150)
        return -((2 * _APART) ** 0.5) * whole / length / fisher.double().sqrt()

    @staticmethod
    def curvature(move: Tensor, change: Tensor, fisher: Tensor) -> Tensor:
        """``[N]`` that of the bound along a move, where that of the factor is 1, by the change of the loss's gradient."""
        move = move.double()
        found = (move * change.double()).sum(-1) / (move.square() * fisher.double()).sum(-1)
        return found.nan_to_num(nan=_FLAT).clamp(_FLAT, 1.0)

    def estimate(self) -> RemainingGain:
        """What is left at the mean of the parameters before each step, if the bound is as curved as the factor says."""
        count, answered = self._count, 1 - self.decay
        one, other = self._sums / count
        noise = self._noise / count
        rows = 0.5 * ((one * other).sum(-1) + answered * noise.sum(-1) / count)
        # With the mean s and half of the difference d of both draws' noise, of variance v / 2 K each, and a gradient that has
        # become g - answered s, the error of the product is 2 g s + (1 - 2 answered) s^2 - d^2.
        squares = ((0.5 * (one + other)).square() - (1 - answered) ** 2 * noise / (2 * count)) * noise
        of_noise = 0.5 * ((1 - 2 * answered) ** 2 + 1) * (noise / count).square()
        variance = 2 * squares.sum(-1).clamp(min=0) / count + of_noise.sum(-1)
        return RemainingGain(rows, 0.5 * variance.sqrt())


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
