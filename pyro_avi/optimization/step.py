"""How a training step moves parameters: gradient, clipping, Adam; eagerly, or as one compiled graph."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_avi.compilation.cost import Work, count_work
from pyro_avi.compilation.fallback import log_graph
from pyro_avi.compilation.inductor import NO_COMPILER, has_compiler
from pyro_avi.distributed.ranks import Ranks
from pyro_avi.distributed.row_counts import RowCounts
from pyro_avi.optimization.adam import Adam
from pyro_avi.optimization.compiled_step import CompiledStep
from pyro_avi.optimization.gradient import BackwardGradient, Gradient, LossAndGrads, averaged, clipped
from pyro_avi.optimization.kl_weight import KLWeight
from pyro_avi.optimization.losses import find_parameters, gives_loss, keeps_one_graph
from pyro_avi.optimization.step_state import Update
from pyro_avi.optimization.traced_step import why_not_compiled
from pyro_avi.param_store import buffers_restored
from pyro_avi.seeds import seeded

__all__ = ["HasLocalParameters", "HasRowTables", "LearningRate", "StepOptions", "TrainingStep"]

LearningRate = float | Callable[[int], float]

# Seconds to compile a step of few operations, and then for another shape; roughly, on one core.
_COST_OF_COMPILING, _COST_OF_A_SHAPE = 13.0, 5.0
_OTHER_SHAPES = 1 / 8  # The share of steps with another shape: the last batches of epochs of eight.


@runtime_checkable
class HasLocalParameters(Protocol):
    """A guide that lists the parameters of its inference function, apart from those of the global latents."""

    def local_parameters(self) -> list[nn.Parameter]:
        """The parameters of the inference function."""
        ...


@runtime_checkable
class HasRowTables(Protocol):
    """A guide with parameters for each row, which move only when their row is in the batch."""

    def row_tables(self) -> Mapping[str, nn.Parameter]:
        """The tables ``[N, P]`` by name."""
        ...

    def check_rows(self, *args, **kwargs) -> None:
        """Refuse a call that is about other rows than those of the tables."""
        ...

    @property
    def rows_on(self) -> str | None:
        """``None`` for tables on the device of the model, which a compiled step can contain; ``"disk"`` for those in files."""
        ...

    def row_moments(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """The memory of a new training's moments of a table, see :class:`~pyro_avi.optimization.adam.Adam`."""
        ...

    def gather_rows(self, *args, **kwargs) -> Any:
        """The rows that a call reads, for a compiled step that does not contain the tables; they are moved outside of it."""
        ...

    def touched_rows(self, gathered: Any = None) -> Any:
        """A context with a list, to which every call of the guide adds ``(name, index, rows)``.

        ``rows [B, P]`` are a leaf of the autograd graph, the rows ``index`` of the table of that name; with ``None`` all rows
        in order. ``gathered`` are the rows of these calls, if they have been gathered before.
        """
        ...


class StepOptions(NamedTuple):
    """How a training moves its parameters, by the options of :func:`~pyro_avi.fit`.

    Attributes:
        optimizer: makes the optimizer of all parameters; by default Adam, row by row for tables.
        lr: the learning rate, or one for each part.
        clip_norm: the largest norm of the gradient of all parameters together, ``None`` for any.
        precision: of matrix products.
        compile: whether a step is one graph; ``"auto"``: where that saves time.
        kl_weight: of the divergence from the prior in the loss, a number or a function of the step.
    """

    optimizer: Callable[..., torch.optim.Optimizer] | None
    lr: LearningRate | Mapping[str, LearningRate]
    clip_norm: float | None
    precision: str
    compile: str | bool
    kl_weight: LearningRate = 1.0


class TrainingStep:
    """The parameters of one training and how a step moves them.

    Args:
        model, guide, elbo: what is trained, and by which loss.
        options: how a step moves the parameters.
        num_steps: the number of steps to go.
        call, kwargs: the arguments of the first step.
        ranks: the processes that take the step together; ``None`` for this one alone.

    Attributes:
        parameters: all that the loss depends on and can be trained.
        device: of the arithmetic.
        gradient: the eager gradient.
        compiled: the step as one graph, if it is one.
        kl_weight: of the divergence from the prior; ``None`` where it is 1 at every step.
        optimizer: the torch optimizer of all parameters that have no :class:`~pyro_avi.optimization.adam.Adam` of their own.
        optimizer_is_given: whether :attr:`optimizer` is the user's.
        on_disk: the tables that are in files, which are never copied.
    """

    _work: Work | None = None

    def __init__(
        self,
        model: Callable,
        guide: Any,
        elbo: ELBO,
        *,
        options: StepOptions,
        num_steps: int,
        call: tuple,
        kwargs: Mapping[str, Any],
        ranks: Ranks | None = None,
    ):
        optimizer, lr, clip_norm, precision, compile, kl_weight = options
        by_row = isinstance(guide, HasRowTables)
        if by_row and optimizer is not None and guide.rows_on == "disk":
            raise ValueError(
                "Expected optimizer=None, which is Adam row by row, for a guide with rows_on='disk', got one that moves "
                "all rows at every step."
            )
        by_row = by_row and optimizer is None
        if by_row and keeps_one_graph(elbo):
            raise ValueError(
                f"Expected an ELBO that runs the guide at every step, for one with a table, got {type(elbo).__name__}."
                f"\nPass {type(elbo).__name__.removeprefix('Jit')}(...), and compile=True for one graph a step."
            )
        if is_weighted := callable(kl_weight) or kl_weight != 1:
            KLWeight.check(elbo)
        self.parameters, self.device = find_parameters(elbo, model, guide, call, kwargs)
        self.kl_weight: KLWeight | None = None
        if is_weighted:
            self.kl_weight = KLWeight(elbo, kl_weight, dtype=self.parameters[0].dtype, device=self.device)
            elbo = self.kl_weight.elbo
        self._clip_norm, self._ranks, self._rows = clip_norm, ranks, RowCounts(guide)
        groups = _parameter_groups(self.parameters, guide, lr)
        self._rates = [rate for _, rate in groups]
        group_of = {id(p): group for group, (members, _) in enumerate(groups) for p in members}
        tables = {name: x for name, x in guide.row_tables().items() if id(x) in group_of} if by_row else {}
        self._tables = {
            name: Update(Adam(x, rows=True, moments=guide.row_moments(name)), group_of[id(x)])
            for name, x in tables.items()
        }
        self.on_disk = list(tables.values()) if by_row and guide.rows_on == "disk" else []
        in_tables = set(map(id, tables.values()))
        self._parameters = [p for members, _ in groups for p in members if id(p) not in in_tables]
        self.check_rows = guide.check_rows if tables else lambda *args, **kwargs: None
        self.gradient = self._make_gradient(model, guide, elbo, precision)
        if compile == "auto":
            compile = self._should_compile(model, guide, elbo, call, kwargs, num_steps)
        self.optimizer: torch.optim.Optimizer | None = None
        self._updates: list[Update] | None = None
        self.optimizer_is_given = optimizer is not None
        # What several processes exchange stands between the gradient and the optimizer, so that no graph can hold both.
        if compile and optimizer is None and ranks is None:
            self._updates = [Update(Adam(p), group_of[id(p)]) for p in self._parameters]
        elif self._parameters:
            make = partial(torch.optim.Adam, fused=True) if optimizer is None else optimizer
            self._make_optimizer(make, [group_of[id(p)] for p in self._parameters])
        self.compiled: CompiledStep | None = None
        if compile:
            others = partial(self._saves_time, model, call, kwargs, round(_OTHER_SHAPES * num_steps), _COST_OF_A_SHAPE)
            self.compiled = self._make_compiled(model, guide, elbo, others)
        self._evaluate = self.compiled or self.gradient

    def _make_gradient(self, model: Callable, guide: Any, elbo: ELBO, precision: str) -> Gradient:
        evaluate = elbo.differentiable_loss if gives_loss(elbo) else elbo.loss_and_grads
        touched_rows = guide.touched_rows if self._tables else lambda gathered: nullcontext([])
        kind = Gradient if gives_loss(elbo) else partial(BackwardGradient, found=self.parameters)
        return kind(partial(evaluate, model, guide), self._parameters, touched_rows, precision)

    def _make_compiled(self, model: Callable, guide: Any, elbo: ELBO, all_shapes: Callable[[], bool]) -> CompiledStep:
        outside = bool(self._tables) and guide.rows_on is not None
        inside, gather = ({}, guide.gather_rows) if outside else (self._tables, None)
        return CompiledStep(
            self.gradient, model, guide, elbo, self._updates, inside, self._clip_norm, gather, all_shapes=all_shapes
        )

    def _should_compile(
        self, model: Callable, guide: Callable, elbo: ELBO, call: tuple, kwargs: Mapping[str, Any], num_steps: int
    ) -> bool:
        """Whether a step can be compiled, and the steps to go save more time than that takes; why it cannot be is logged."""
        reason = why_not_compiled(elbo, self._parameters, (model, guide), call, kwargs)
        if reason is None and self.device.type == "cpu" and not has_compiler():
            reason = NO_COMPILER
        if reason is None:
            return self._saves_time(model, call, kwargs, num_steps, _COST_OF_COMPILING)
        # In a training in which the smallest step would be.
        if Work(0, 0).is_worth_compiling(num_steps, _COST_OF_COMPILING):
            log_graph("The training step", reason)
        return False

    def _saves_time(self, model: Callable, call: tuple, kwargs: Mapping[str, Any], num_steps: int, cost: float) -> bool:
        """Whether so many compiled steps save more seconds than they cost; one eager step is taken to count operations."""
        with buffers_restored(model), seeded(None):
            self._work = self._work or count_work(self.gradient, call, kwargs)
        return self._work.is_worth_compiling(num_steps, cost)

    def _make_optimizer(self, make: Callable[..., torch.optim.Optimizer], groups: Sequence[int]) -> None:
        """One optimizer of all parameters, each in the group given for it."""
        # A group of the learning rates may have no parameter beside tables.
        self._groups = sorted(set(groups))
        members = [
            [p for p, own in zip(self._parameters, groups, strict=True) if own == group] for group in self._groups
        ]
        rates = [_rate_at(self._rates[group], 0) for group in self._groups]
        options = [{"params": params, "lr": rate} for params, rate in zip(members, rates, strict=True)]
        self.optimizer = make(options, lr=rates[0])

    def rates(self, step: int) -> list[float]:
        """The learning rate of each group."""
        return [_rate_at(rate, step) for rate in self._rates]

    def step(self, step: int, call: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Move the parameters; return the loss before."""
        self.check_rows(*call, **kwargs)
        rates = self.rates(step)
        if self.kl_weight is not None:
            self.kl_weight.set(step)
        if self.compiled is not None:
            self.compiled.state.set_rates(rates)
        result = self._evaluate(call, kwargs)
        if self.on_disk and not all(grad is None or grad.isfinite().all() for _, _, grad in result.rows):
            # Of tables on disk there is no copy to go back to.
            return torch.full_like(result.loss, math.nan)
        if self._ranks is not None:
            result = averaged(result, self._ranks, self._rows(call, kwargs), self._clip_norm)
        # A loss that is not finite moves nothing, so that its cause can still be found; a graph sees to that itself.
        if self.device.type != "cpu" or math.isfinite(result.loss.item()):
            # A graph has moved the parameters itself, by a clipped gradient.
            moved = result.grads is None or self._ranks is not None
            self._move(result if moved else clipped(result, self._clip_norm), rates)
        return result.loss

    @property
    def adams(self) -> list[Adam]:
        """The optimizers of tables, and in a compiled step of every parameter."""
        return [update.adam for update in (*self._tables.values(), *(self._updates or ()))]

    def _move(self, result: LossAndGrads, rates: Sequence[float]) -> None:
        if result.grads is not None:
            self._move_parameters(result.grads, rates)
        for name, index, grad in result.rows:
            if grad is not None:
                self._tables[name].adam.step(index, grad, rates[self._tables[name].group])

    def _move_parameters(self, grads: Sequence[Tensor | None], rates: Sequence[float]) -> None:
        if self.optimizer is not None:
            for options, group in zip(self.optimizer.param_groups, self._groups, strict=True):
                options["lr"] = rates[group]
            for parameter, grad in zip(self._parameters, grads, strict=True):
                parameter.grad = grad
            self.optimizer.step()
            for parameter in self._parameters:
                parameter.grad = None
        for update, grad in zip(self._updates or (), grads, strict=self._updates is not None):
            if grad is not None:
                update.adam.step(None, grad, rates[update.group])


def _parameter_groups(parameters, guide, lr) -> list[tuple[list[Tensor], LearningRate]]:
    """The groups of parameters that have one learning rate each; parameters of no group are not trained."""
    if not isinstance(lr, Mapping):
        return [(parameters, lr)]
    if not lr or set(lr) - {"local", "global"}:
        raise ValueError(f'Expected learning rates for "local", "global" or both, got {sorted(lr)}.')
    if not isinstance(guide, HasLocalParameters):
        raise ValueError(
            f"Expected one learning rate for a {type(guide).__name__}, which does not tell local from global parameters, "
            f"got {sorted(lr)}."
        )
    local = {id(parameter) for parameter in guide.local_parameters()}
    groups = [([p for p in parameters if (id(p) in local) is (name == "local")], rate) for name, rate in lr.items()]
    if not any(group for group, _ in groups):
        raise ValueError(f"Expected parameters for the learning rates {sorted(lr)}, found none.")
    return groups


def _rate_at(rate: LearningRate, step: int) -> float:
    return rate(step) if callable(rate) else rate
