"""The gradient of single draws: by parameter, by row, with what they cost."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.elbos.sites import is_drawn, parameters_of
from pyro_avi.optimization.losses import HasDifferentiableLoss

__all__ = ["GradientDraws", "Moments"]

# The learning rate of the networks of learned baselines.
_RATE = 1e-2


class Moments:
    """Mean and variance of tensors that come one after another."""

    def __init__(self):
        self.count = 0
        self._mean: Any = 0.0
        self._squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        """Count one more."""
        self.count += 1
        before = value - self._mean
        self._mean = self._mean + before / self.count
        self._squares = self._squares + before * (value - self._mean)

    @property
    def variance(self) -> Tensor:
        """The variance of each element."""
        return self._squares / (self.count - 1)


@dataclass
class GradientDraws:
    """Evaluates one estimator on the draws of given seeds.

    Args:
        elbo: its ELBO.
        model, guide: the pair, the guide as the user has it.
        wrap: from the guide to the one that the ELBO is to run.
        args, kwargs: the call.
        parameters: in which the gradient is taken.

    Attributes:
        rows: by site the moments of the gradient in the parameters of the guide's factors, ``[*B, F]``.
        seconds: of each evaluation.
        evaluations: of the likelihood of every row, those of one draw.
    """

    elbo: ELBO
    model: Callable
    guide: Callable
    wrap: Callable[[Callable], Callable]
    args: tuple
    kwargs: Mapping[str, Any]
    parameters: Sequence[Tensor]
    rows: dict[str, Moments] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    evaluations: float = 0.0

    def __post_init__(self) -> None:
        self._factors = _Factors()
        self._likelihood = _Likelihood()
        with poutine.block(), torch.no_grad(), self._likelihood:
            poutine.replay(self.model, trace=poutine.trace(self.guide).get_trace(*self.args, **self.kwargs))(
                *self.args, **self.kwargs
            )
        self._of_one_run, self._likelihood.count = self._likelihood.count, 0
        self._guide = self.wrap(self._factors(self.guide))
        self._counted = self._likelihood(self.model)

    def warm_up(self, count: int) -> None:
        """Evaluate so many times, and fit the networks of learned baselines meanwhile.

        Args:
            count: the number of evaluations.
        """
        optimizer: torch.optim.Optimizer | None = None
        for _ in range(count):
            self._evaluate()
            if isinstance(self.elbo, RaoBlackwellizedELBO) and self.elbo.networks:
                own = [p for network in self.elbo.networks.values() for p in network.parameters()]
                optimizer = optimizer or torch.optim.Adam(own, lr=_RATE)
                optimizer.step()
        self._likelihood.count = 0

    def draw(self, seed: int) -> Tensor:
        """``[P]`` the gradient of the bound in all parameters, by the draws of a seed.

        Args:
            seed: of the draw.
        """
        torch.manual_seed(seed)
        # That of this process alone, where the process does the work.
        clock = time.process_time if self.parameters[0].device.type == "cpu" else time.perf_counter
        started = clock()
        self._evaluate()
        self.seconds.append(clock() - started)
        self.evaluations = self._likelihood.count / (len(self.seconds) * max(self._of_one_run, 1))
        for name, grad in self._factors.gradients().items():
            self.rows.setdefault(name, Moments()).add(-grad.double())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = -torch.cat([grad.flatten().double().cpu() for grad in grads])
        for parameter in self.parameters:
            parameter.grad = None
        return gradient

    def _evaluate(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        networks = self.elbo.networks if isinstance(self.elbo, RaoBlackwellizedELBO) else {}
        for network in networks.values():
            network.zero_grad()
        self._factors.clear()
        with pyro.validation_enabled(False):
            if isinstance(self.elbo, HasDifferentiableLoss):
                self.elbo.differentiable_loss(self._counted, self._guide, *self.args, **self.kwargs).backward()
            else:
                self.elbo.loss_and_grads(self._counted, self._guide, *self.args, **self.kwargs)


class _Factors(Messenger):
    """Keeps the parameters of a guide's factors, so that their gradient can be read."""

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forget them."""
        self._kept: dict[str, dict[str, tuple[list[int], Tensor]]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_drawn(msg):
            return
        batch = msg["fn"].batch_shape
        rows = sorted(frame.dim + len(batch) for frame in msg["cond_indep_stack"] if frame.vectorized)
        for name, x in parameters_of(msg["fn"]).items():
            if x.requires_grad and x.shape[: len(batch)] == batch:
                x.retain_grad()
                self._kept.setdefault(msg["name"], {})[name] = rows, x

    def gradients(self) -> dict[str, Tensor]:
        """``[*B, F]`` by site, in all parameters of its factors."""
        found = {}
        for name, kept in self._kept.items():
            grads = [
                x.grad.movedim(rows, list(range(len(rows)))).reshape(*(x.shape[dim] for dim in rows), -1)
                for rows, x in kept.values()
                if x.grad is not None
            ]
            if grads:
                found[name] = torch.cat(grads, -1)
        return found


class _Likelihood(Messenger):
    """Counts the observed elements whose density is evaluated."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            fn, value = msg["fn"], msg["value"]
            batch = value.shape[: value.dim() - len(fn.event_shape)]
            self.count += torch.broadcast_shapes(fn.batch_shape, batch).numel()
