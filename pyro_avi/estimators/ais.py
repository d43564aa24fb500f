"""Annealed importance sampling with Hamiltonian transitions, on arrays."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Path", "anneal", "pilot", "temperatures"]

# From points [C, B, K] to the log densities [C, B] of the two ends of the path, the second not normalized.
Path = Callable[[Tensor], tuple[Tensor, Tensor]]

# The acceptance rate that the pilot run adapts step sizes to, near the optimum for trajectories of several steps; and the
# rate of this adaptation.
_ACCEPTED, _RATE = 0.8, 0.5
# Transitions at the first temperature before the temperature of the pilot's chains changes.
_WARM_UP = 15


def _ignore() -> None:
    """Count nothing."""


def temperatures(count: int) -> Tensor:
    r"""``[count + 1]`` inverse temperatures from 0 to 1, close together at both ends where densities change fastest.

    .. math:: \beta_t = \frac{s(4 (2 t / T - 1)) - s(-4)}{s(4) - s(-4)}, \qquad s(x) = 1 / (1 + e^{-x})

    References:
        Wu, Burda, Salakhutdinov and Grosse, "On the quantitative analysis of decoder-based generative models", 2017,
        https://arxiv.org/abs/1611.04273.
    """
    beta = torch.linspace(-4.0, 4.0, count + 1, dtype=torch.double).sigmoid()
    return (beta - beta[0]) / (beta[-1] - beta[0])


def anneal(
    path: Path,
    start: Tensor,
    *,
    beta: Tensor,
    step_sizes: Tensor,
    num_leapfrog: int,
    reverse: bool = False,
    tick: Callable[[], object] = _ignore,
) -> Tensor:
    r"""The log weights ``[C, B]`` of annealed importance sampling, in double precision.

    Chains follow :math:`\log p_t = (1 - \beta_t) \log p_0 + \beta_t \log p_1`; before each transition the weight grows by
    :math:`(\beta_t - \beta_{t-1}) (\log p_1 - \log p_0)`. The expected weight is the ratio of the normalizers. In reverse
    the chains start from draws of :math:`p_1` and go through the temperatures backwards, and the expectation of ``1 / w`` is
    the inverse ratio.

    Args:
        path: the two log densities of points.
        start: ``[C, B, K]`` draws from the first density, in reverse from the second.
        beta: ``[T + 1]`` from 0 to 1.
        step_sizes: ``[T - 1, B]`` of the transitions at the temperatures in between. They are not adapted here: a kernel
            that depends on the chain's past leaves no density invariant.
        num_leapfrog: the number of leapfrog steps a transition.
        reverse: whether to go from the second density to the first.
        tick: called after each of the ``T - 1`` transitions.

    References:
        Neal, "Annealed importance sampling", 2001, https://arxiv.org/abs/physics/9803008. Grosse, Ancha and Roy,
        "Measuring the reliability of MCMC inference with bidirectional Monte Carlo", 2016,
        https://arxiv.org/abs/1606.02275.
    """
    point = _Point.evaluate(path, start)
    rise = beta.diff().tolist()
    weights = torch.zeros_like(point.base)
    # The transition at each temperature in between, and the rise of the weight on its hotter or, in reverse, colder side.
    steps = range(1, len(beta) - 1)
    weights = weights + (rise[-1] if reverse else rise[0]) * point.difference
    for t in reversed(steps) if reverse else steps:
        point, _ = _transition(path, point, beta[t].item(), step_sizes[t - 1], num_leapfrog)
        weights = weights + rise[t - 1 if reverse else t] * point.difference
        tick()
    return weights


def pilot(
    path: Path, start: Tensor, *, beta: Tensor, num_leapfrog: int, tick: Callable[[], object] = _ignore
) -> Tensor:
    """Step sizes ``[T - 1, B]`` at which about four of five proposals are accepted, found by a run of other chains.

    Args:
        path, beta, num_leapfrog, tick: as in :func:`anneal`; transitions of the warm-up are not counted.
        start: ``[C, B, K]`` draws from the first density; a row's chains share its step size.
    """
    point = _Point.evaluate(path, start)
    log_size = torch.full_like(start[0, :, 0], 0.5).div(start.shape[-1] ** 0.25).log()
    found = []
    for step, t in enumerate([1] * _WARM_UP + list(range(1, len(beta) - 1))):
        point, accepted = _transition(path, point, beta[min(t, len(beta) - 1)].item(), log_size.exp(), num_leapfrog)
        log_size = log_size + _RATE * (accepted.mean(0) - _ACCEPTED).to(log_size)
        found.append(log_size.exp())
        if step >= _WARM_UP:
            tick()
    return torch.stack(found[_WARM_UP:]) if len(beta) > 2 else start.new_zeros(0, start.shape[1])


@dataclass(frozen=True)
class _Point:
    """The states of the chains ``[C, B, K]``, and the two log densities ``[C, B]`` there."""

    u: Tensor
    base: Tensor
    target: Tensor

    @classmethod
    def evaluate(cls, path: Path, u: Tensor) -> "_Point":
        with torch.no_grad():
            base, target = path(u)
        return cls(u, base.double(), target.double())

    @property
    def difference(self) -> Tensor:
        return self.target - self.base

    def density(self, beta: float) -> Tensor:
        return (1 - beta) * self.base + beta * self.target


def _transition(path: Path, point: _Point, beta: float, step_size: Tensor, num_leapfrog: int) -> tuple[_Point, Tensor]:
    """One Hamiltonian transition of every chain at a temperature; the new points and the acceptance rates ``[C, B]``."""
    size = step_size.unsqueeze(-1)
    momentum = torch.randn_like(point.u)
    energy = point.density(beta) - _kinetic(momentum)
    u, (_, grad) = point.u, _gradient(path, point.u, beta)
    for _ in range(num_leapfrog):
        momentum = momentum + 0.5 * size * grad
        u = u + size * momentum
        new, grad = _gradient(path, u, beta)
        momentum = momentum + 0.5 * size * grad
    log_ratio = new.density(beta) - _kinetic(momentum) - energy
    accepted = _accept(log_ratio)
    moved = _Point(
        torch.where(accepted.unsqueeze(-1), u, point.u),
        torch.where(accepted, new.base, point.base),
        torch.where(accepted, new.target, point.target),
    )
    return moved, log_ratio.exp().clamp(max=1.0).nan_to_num(0.0)


def _accept(log_ratio: Tensor) -> Tensor:
    """Metropolis' rule; a trajectory that ended in nan or infinity is rejected."""
    return torch.rand_like(log_ratio).log() < log_ratio


def _kinetic(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.double().square().sum(-1)


def _gradient(path: Path, u: Tensor, beta: float) -> tuple[_Point, Tensor]:
    """The log densities at a point, and the gradient ``[C, B, K]`` of the log density at a temperature."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        base, target = path(u)
        (grad,) = torch.autograd.grad(((1 - beta) * base + beta * target).sum(), u)
    return _Point(u.detach(), base.detach().double(), target.detach().double()), grad
