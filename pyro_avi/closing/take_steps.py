"""Steps of all rows of a table, and what they lead to on average."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import pyro
import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.optim import Adam, Optimizer

from pyro_avi.closing.natural_steps import NaturalSteps
from pyro_avi.closing.row_tables import Tables
from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.evidence.enumerated import Enumerated, enumerating_elbo
from pyro_avi.guides import FactorizedGuide
from pyro_avi.seeds import seeded
from pyro_avi.training.fit import Fit, LearningRate, fit

__all__ = ["TwoDraws", "Watch", "take_steps"]

# Draws of a step.
_PARTICLES = 2
# Adam's rate for a share of the natural gradient: 0.05 where the share is 0.2.
_OF_ADAM = 0.25


def take_steps(
    model: Callable,
    guide: FactorizedGuide,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_steps: int,
    lr: LearningRate,
    seed: int,
    progress: bool = False,
    shares: Mapping[str, Tensor] | None = None,
    watch: "Watch | None" = None,
) -> None:
    """Move the tables of a guide from where they are to the mean of the second half of the steps, and nothing else.

    Args:
        model, guide: the guide is made for the model.
        args, kwargs: the arguments of both.
        num_steps, lr, seed, progress: as in :func:`~pyro_avi.refine`.
        shares: by the name of the table ``[N, 1]``, which share of the learning rate a row moves by; 1 by default.
        watch: sees the gradients of each step, and may end them. The tables then stay where the last step led.
    """
    tables = guide.row_tables()
    mean = _MeanOfTables(tables, first=num_steps // 2 + 1)
    summed = enumerating_elbo(model, guide, args, kwargs)
    particles = _PARTICLES if watch is None else 1
    trained, elbo = (guide, _loss(guide, particles)) if summed is None else (Enumerated(guide), summed)
    scaled = [] if shares is None else [_ScaledRates(tables, shares)]
    optimizer, rate = _optimizer(guide, lr)
    # A compiled step keeps no gradients.
    compile: str | bool = "auto" if watch is None else False
    if watch is not None:
        elbo = watch.draws = TwoDraws(elbo, tables)
    # Only the tables are trained: shared weights would make the rows depend on one another.
    shared = [parameter for row_factor in guide.row_factors for parameter in row_factor.factor.parameters()]
    # In evaluation mode, in which Pyro does not warn about parameters without a gradient.
    guide.row_factors.eval()
    for parameter in shared:
        parameter.requires_grad_(False)
    callbacks: list[Callable[[Fit], Any]] = [*scaled, mean if watch is None else watch]
    with warnings.catch_warnings(), evaluation_mode():
        # The warning is about global latents after local ones in the model; frozen, they only add a constant.
        warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
        fit(
            model,
            trained,
            *args,
            num_steps=num_steps,
            lr={"local": rate},
            optimizer=optimizer,
            elbo=elbo,
            compile=compile,
            callbacks=callbacks,
            seed=seed,
            progress=progress,
            **kwargs,
        )
    for parameter in shared:
        parameter.requires_grad_(True)
    if watch is None:
        mean.take()
    guide.row_factors.train()


def _optimizer(guide: FactorizedGuide, lr: LearningRate) -> tuple[Callable[..., Optimizer], LearningRate]:
    """What moves the tables of a guide, and at which rate."""
    tables = {row_factor.function.table: row_factor.factor.fisher for row_factor in guide.row_factors}
    if all(fisher(table) is not None for table, fisher in tables.items()):
        known = cast(dict[int, Callable[[Tensor], Tensor]], {id(table): fisher for table, fisher in tables.items()})
        return partial(NaturalSteps, fisher=known), lr
    return Adam, (lambda step: _OF_ADAM * lr(step)) if callable(lr) else _OF_ADAM * lr


class TwoDraws:
    """A loss by two draws whose gradients in the tables are kept apart: their product has no noise in it, on average.

    Args:
        elbo: of one draw.
        tables: by name.

    Attributes:
        gradients: by name those of each draw of the last evaluation, ``[2, N, P]``.
    """

    def __init__(self, elbo: Any, tables: Tables):
        self._elbo, self._tables = elbo, tables
        self.gradients: dict[str, Tensor] = {}
        self._call: tuple = ()

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The mean loss of two draws; its gradient is known in the tables alone."""
        self._call = model, guide, args, kwargs
        tables, losses, gradients = list(self._tables.values()), [], []
        for _ in range(_PARTICLES):
            loss, found = self._evaluate()
            losses.append(loss)
            gradients.append(found)
        both = [torch.stack(each) for each in zip(*gradients, strict=True)]
        self.gradients = dict(zip(self._tables, both, strict=True))
        linear = torch.stack([(table * each.mean(0)).sum() for table, each in zip(tables, both, strict=True)]).sum()
        return torch.stack(losses).mean() + linear - linear.detach()

    def _evaluate(self) -> tuple[Tensor, list[Tensor]]:
        """The loss of one draw and its gradient in each table, of the last call."""
        model, guide, args, kwargs = self._call
        tables = list(self._tables.values())
        with torch.enable_grad():
            loss = self._elbo.differentiable_loss(model, guide, *args, **kwargs)
            found = torch.autograd.grad(loss, tables, allow_unused=True)
        return loss.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(tables, found, strict=True)]

    @torch.no_grad()
    def changes(self, moves: Tables, *, seed: int) -> dict[str, Tensor]:
        """By how much the gradients of the last call change when the tables are moved, by one and the same draw ``[N, P]``.

        Args:
            moves: ``[N, P]`` by name; the tables are put back.
            seed: of the draw.
        """
        before = {name: table.clone() for name, table in self._tables.items()}
        with seeded(seed), pyro.validation_enabled(False):
            _, here = self._evaluate()
        for name, table in self._tables.items():
            table += moves[name].to(table)
        with seeded(seed), pyro.validation_enabled(False):
            _, there = self._evaluate()
        for name, table in self._tables.items():
            table.copy_(before[name])
        return {name: b - a for name, a, b in zip(self._tables, here, there, strict=True)}


class Watch(Protocol):
    """What sees the gradients of steps: a callback of their training, which may end it.

    Attributes:
        draws: the loss that keeps the gradients, set before the first step.
    """

    draws: TwoDraws

    def __call__(self, training: Fit) -> bool:
        """Take note of a step."""
        ...


class _MeanOfTables:
    """The mean of tables over the steps of a training from one on; a callback of it.

    Args:
        tables: by name.
        first: the number of the first step to count, from 1.
    """

    def __init__(self, tables: Tables, *, first: int):
        self._tables, self._first, self._count = tables, first, 0
        self._sums = {name: torch.zeros_like(table) for name, table in tables.items()}

    @torch.no_grad()
    def __call__(self, training: Fit) -> None:
        if training.steps >= self._first:
            self._count += 1
            for name, table in self._tables.items():
                self._sums[name] += table

    @torch.no_grad()
    def take(self) -> None:
        """Write the means into the tables."""
        for name, table in self._tables.items():
            table.copy_(self._sums[name] / self._count)


class _ScaledRates:
    """Rows that move by a share of the learning rate; a callback of a training.

    What a step moves a row by is proportional to the rate, so that a share of the move is the move at a share of the rate.

    Args:
        tables: by name.
        shares: ``[N, 1]`` by name.
    """

    def __init__(self, tables: Tables, shares: Mapping[str, Tensor]):
        self._tables, self._shares = tables, shares
        self._last = {name: table.detach().clone() for name, table in tables.items()}

    @torch.no_grad()
    def __call__(self, training: Fit) -> None:
        for name, table in self._tables.items():
            table.copy_(torch.lerp(self._last[name], table, self._shares[name].to(table)))
            self._last[name].copy_(table)


def _loss(guide: FactorizedGuide, particles: int) -> ELBO:
    """The loss of a refinement: where there is one, by the gradient of the path alone, which has no noise at the posterior."""
    discrete = any(
        latent.num_values is not None for row_factor in guide.row_factors for latent in row_factor.row_set.latents
    )
    # The gradient of the path alone needs the inverse of a flow.
    by_path = guide.family.cheap_density or discrete
    return (StickingTheLandingELBO if by_path else TraceMeanField_ELBO)(num_particles=particles)
