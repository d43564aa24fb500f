"""The bound of held-out rows during a training, and the end of the training when it no longer rises."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor, nn

from pyro_avi.densities.log_weights import log_weights
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.errors import check_count
from pyro_avi.param_store import buffers_restored
from pyro_avi.seeds import as_seed
from pyro_avi.training.loop import Fit

__all__ = ["Validation"]


# What of a validation changes during a training.
_STATE = ("steps", "best_step", "stopped", "_seconds", "_draws", "_best", "_kept", "_in_vain")


@runtime_checkable
class KnowsRows(Protocol):
    """A guide with parameters for rows, which are not to be taken for those of others."""

    def knows_rows(self, *args, **kwargs) -> bool:
        """Whether it can be told that a call is about these rows."""
        ...


class Validation:
    r"""A callback of :func:`~pyro_avi.fit` that evaluates the bound of held-out rows, and may stop the training early.

    .. math:: \frac{1}{M} \sum_m E_{q(\theta, z_m)} \left[ \log \frac{p(x_m, z_m \mid \theta)}{q(z_m)} \right]

    It is the local part of the ELBO, in nats a row: of rows that the training does not see, whose global latents are paid for
    elsewhere. Where something ties rows the mean is over blocks of them, and without latents of rows the call is one row. Its
    draws are its own and the same every time, so that two evaluations differ by what was learned and hardly by their draws;
    modules are in evaluation mode. The training gives the same numbers with and without it, and its time is not counted.

    Rows that have parameters of their own have none before they are trained: a :class:`~pyro_avi.FactorizedGuide` answers
    for its own rows alone, and refuses others. Validate the model beside an amortized or constant guide, or after the
    training by :func:`~pyro_avi.refine`.

    Args:
        model, guide: those that are trained.
        *args, **kwargs: a call of both, with the held-out rows.
        num_samples: the number of draws.
        every: the number of steps between two evaluations. There is also one after the first step, and one after the last.
        patience: the number of evaluations in a row without an improvement after which the training ends; ``None``: never.
        min_delta: nats a row, what counts as an improvement over the best evaluation; it also has to be larger than the
            standard error of the difference to that.
        restore_best: whether model and guide are brought back to the best evaluation when the training ends, where there is a
            ``patience``; by copies of their parameters and buffers that are kept beside them.
        plate: of the rows, as for :func:`~pyro_avi.log_weights`.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.

    Attributes:
        steps: the numbers of steps at which there was an evaluation.
        best_step: that of the best one; evaluations that are no improvement over it are not, even if higher.
        stopped: whether the patience has ended the training.

    Raises:
        ValueError: if a number is not one of the above; when called, if the guide has no parameters for the rows, or the
            callback has seen another training.
        TypeError: when called by :func:`~pyro_avi.fit_many`, with the fits of several trainings.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(30, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model)
        >>> validation = avi.Validation(model, guide, x[20:], num_samples=10, every=20, patience=3)
        >>> result = avi.fit(model, guide, x[:20], num_steps=50, callbacks=[validation], progress=False)
        >>> validation.steps, validation.values.shape
        ([1, 20, 40, 50], torch.Size([4]))
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        *args,
        num_samples: int,
        every: int = 100,
        patience: int | None = None,
        min_delta: float = 0.0,
        restore_best: bool = True,
        plate: str | Sequence[str] | None = None,
        seed: int | None = 0,
        **kwargs,
    ):
        for name, count in (("num_samples", num_samples), ("every", every), ("patience", patience)):
            if count is not None:
                check_count(name, count)
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"Expected min_delta of at least 0 nats a row, got {min_delta}.")
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        self._every, self._patience, self._min_delta = every, patience, min_delta
        self._num_samples, self._plate = num_samples, plate
        self._seed, self._keeps = as_seed(seed), restore_best and patience is not None
        self.steps: list[int] = []
        self.best_step: int | None = None
        self.stopped = False
        self._seconds: list[float] = []
        self._draws: list[Tensor] = []
        self._best: Tensor | None = None
        self._kept: dict[str, Tensor] = {}
        self._in_vain = 0

    @property
    def seconds(self) -> Tensor:
        """``[E]`` the seconds of training before each evaluation."""
        return torch.tensor(self._seconds, dtype=torch.double)

    @property
    def values(self) -> Tensor:
        """``[E]`` the bounds, in nats a row."""
        return torch.tensor([draws.mean().item() for draws in self._draws], dtype=torch.double)

    @property
    def errors(self) -> Tensor:
        """``[E]`` their standard errors over the draws; ``nan`` for a single one."""
        return torch.tensor([_error(draws) for draws in self._draws], dtype=torch.double)

    def __repr__(self) -> str:
        if self.best_step is None:
            return "Validation(no evaluation yet)"
        best = self.steps.index(self.best_step)
        bound = with_error(self.values[best].item(), self.errors[best].item())
        stopped = f", stopped after {self.steps[-1]:,}" if self.stopped else ""
        return (
            f"Validation({counted(len(self.steps), 'evaluation')}, best {bound} nats a row after "
            f"{counted(self.best_step, 'step')}{stopped})"
        )

    def __call__(self, training: Fit) -> bool:
        """Evaluate the bound if it is time; return whether the training is to end."""
        self._check(training)
        last = training.steps == training.num_steps
        if self.steps and training.steps % self._every and not last:
            return False
        draws = self._evaluate()
        self.steps.append(training.steps)
        self._seconds.append(training.seconds)
        self._draws.append(draws)
        if self._improves(draws):
            self._best, self.best_step, self._in_vain = draws, training.steps, 0
            self._keep()
        else:
            self._in_vain += 1
        self.stopped = self._patience is not None and self._in_vain >= self._patience
        if self._keeps and (self.stopped or last):
            self.restore()
        return self.stopped

    def next_call(self, steps: int) -> int:
        """After how many steps in all it evaluates next, where so many have been taken; also after the last one."""
        # At once at first, and in another training, which it refuses.
        waits = self.steps and steps >= self.steps[-1]
        return steps + self._every - steps % self._every if waits else steps + 1

    @torch.no_grad()
    def restore(self) -> None:
        """Bring model and guide to the best evaluation.

        The training does so itself at its end, unless another callback has ended it, or it was interrupted.

        Raises:
            ValueError: if no state was kept: without a ``patience``, with ``restore_best=False``, or before an evaluation.
        """
        if not self._kept:
            raise ValueError(
                "Expected a state to go back to, got none: it is kept from the first evaluation on, with a patience= and "
                "restore_best=True."
            )
        for name, tensor in self._tensors().items():
            if name in self._kept:
                tensor.copy_(self._kept[name])

    def state_dict(self) -> dict[str, Any]:
        """The evaluations and the best state so far, for checkpoints of :func:`~pyro_avi.fit`."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for name in _STATE:
            setattr(self, name, state[name])

    def _check(self, training: Fit) -> None:
        if not isinstance(training, Fit):
            raise TypeError(
                f"Expected the Fit of one training, got a {type(training).__name__} of {len(training)}.\n"
                "With avi.fit_many give each replica one of its own, without patience: "
                "callbacks=[lambda fits: [validation(fit) for validation, fit in zip(validations, fits)]]."
            )
        if self.steps and training.steps <= self.steps[-1]:
            raise ValueError(
                f"Expected a training behind step {self.steps[-1]}, the last one evaluated, got step {training.steps}.\n"
                "Make a Validation for each training."
            )

    def _evaluate(self) -> Tensor:
        """``[S]`` the bound of each draw."""
        if not self.steps and isinstance(self._guide, KnowsRows):
            self._check_rows(self._guide)
        with buffers_restored(self._model), buffers_restored(self._guide):
            weights = log_weights(
                self._model,
                self._guide,
                *self._args,
                num_samples=self._num_samples,
                plate=self._plate,
                seed=self._seed,
                progress=False,
                **self._kwargs,
            )
        return weights.local.mean(-1).cpu()

    def _check_rows(self, guide: KnowsRows) -> None:
        if not guide.knows_rows(*self._args, **self._kwargs):
            raise ValueError(
                f"Expected rows that the {type(guide).__name__} has parameters for, with their positions, got a call without.\n"
                "Try one of the following fixes:\n"
                "- for its own rows, pass their positions as well: Validation(model, guide, x, torch.arange(len(x)))\n"
                "- for held-out rows: after the training, avi.refine(model, guide, x_new, num_steps=...)"
            )

    def _improves(self, draws: Tensor) -> bool:
        if self._best is None or not self._best.isfinite().all():
            return True
        gains = draws - self._best
        error = _error(gains) if len(gains) > 1 else 0.0
        return gains.mean().item() > max(self._min_delta, error)

    @torch.no_grad()
    def _keep(self) -> None:
        for name, tensor in self._tensors().items() if self._keeps else ():
            if name in self._kept:
                self._kept[name].copy_(tensor)
            else:
                self._kept[name] = tensor.clone()

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of model and guide."""
        found: dict[str, Tensor] = {}
        for kind, program in (("model", self._model), ("guide", self._guide)):
            root = getattr(program, "__self__", program)
            if isinstance(root, nn.Module):
                own = (*root.named_parameters(), *root.named_buffers())
                found.update((f"{kind}.{name}", tensor) for name, tensor in own)
        known = {id(tensor) for tensor in found.values()}
        named = pyro.get_param_store().named_parameters()
        return found | {f"param.{name}": tensor for name, tensor in named if id(tensor) not in known}


def _error(draws: Tensor) -> float:
    return draws.std().item() / len(draws) ** 0.5 if len(draws) > 1 else math.nan
