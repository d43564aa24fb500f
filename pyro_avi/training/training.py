"""One training: its steps and its state, and how it ends, diverges, is saved and is resumed."""

import math
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from pyro_avi.inspection.data_errors import NoRowsError, explain_data_errors
from pyro_avi.optimization.divergence import explain
from pyro_avi.optimization.step import StepOptions, TrainingStep
from pyro_avi.seeds import random_state, set_random_state
from pyro_avi.training import checkpoint
from pyro_avi.training.loop import DivergedError, Fit
from pyro_avi.training.training_state import StateBackup, TrainingState, are_finite

__all__ = ["Training"]


class Training:
    """Takes the steps of a model and a guide.

    Args:
        model, guide, elbo: what is trained, and by which loss.
        calls: the positional arguments of every step from ``start`` on.
        kwargs: those by keyword.
        start: the number of steps taken before.
        num_steps: the number of steps in all.
        keep: whether to keep a copy of the last finite state.
        options: how a step moves the parameters.

    Raises:
        DivergedError: if model and guide cannot be run on the first call because its data or their parameters are not
            finite.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        elbo: Any,
        calls: Iterator[tuple],
        kwargs: Mapping[str, Any],
        *,
        start: int,
        num_steps: int,
        keep: bool,
        options: StepOptions,
    ):
        self._model, self._guide, self._calls, self._kwargs = model, guide, calls, kwargs
        self._start, self._first = start, next(calls)
        try:
            with explain_data_errors(self._first, kwargs):
                self._training_step = TrainingStep(
                    model, guide, elbo, num_steps=num_steps - start, call=self._first, kwargs=kwargs, options=options
                )
        except NoRowsError:
            raise
        except ValueError as error:
            # torch's validation reports a nan without the name of its site.
            reason = explain(model, guide, self._first, kwargs)
            if reason is None:
                raise
            raise DivergedError(0, math.nan, reason) from error
        self.device = self._training_step.device
        self._state = TrainingState(self._training_step, model, guide)
        self._backup = StateBackup(self._state) if keep else None
        # By step, those since the losses were last checked: a loss that is not finite comes from one of them.
        self._recent: dict[int, tuple] = {}
        self._final_random_state: list[Tensor] | None = None

    def step(self, step: int) -> tuple[Tensor, float]:
        """Take a step; return the loss before it and the seconds spent in compiling so far."""
        call = self._first if step == self._start else next(self._calls)
        if self.device.type == "cpu":
            self._recent.clear()
        self._recent[step] = call
        loss = self._training_step.step(step, call, self._kwargs)
        return loss, 0.0 if self._training_step.compiled is None else self._training_step.compiled.seconds

    def on_finite(self, steps: int) -> None:
        """Back the state up, now that all losses of so many steps are known to be finite."""
        self._recent.clear()
        if self._backup is not None:
            self._backup.update(steps)

    def finish(self, fit: Fit) -> None:
        """Record the random state, from which a resumed training draws on.

        Raises:
            DivergedError: if the last step has moved parameters to nan or infinity.
        """
        self._final_random_state = random_state()
        if not are_finite(self._state.parameters()):
            raise self.diverged(DivergedError(fit.steps, math.nan))

    def diverged(self, error: DivergedError) -> DivergedError:
        """The error with its first cause; the state is that of the backup from now on."""
        call, reason = self._recent.get(error.step), None
        if self.device.type == "cpu" or self._training_step.compiled is not None:
            # Such a loss moves nothing: the parameters are those that it was evaluated at.
            reason = self._wrong_parameters(error.step) or self._explain(call)
        backup = self._backup
        if backup is None or backup.step is None:
            return DivergedError(error.step, error.loss, reason)
        backup.restore()
        return DivergedError(error.step, error.loss, reason or self._explain(call), backup.step)

    def _wrong_parameters(self, step: int) -> str | None:
        wrong = [name for name, value in self._state.parameters().items() if not are_finite({name: value})]
        if not wrong:
            return None
        if step == self._start:
            return f"Not finite from the start: {', '.join(wrong)}."
        return f"The gradient of step {step - 1} was not finite: it moved {', '.join(wrong)} to nan or infinity."

    def _explain(self, call: tuple | None) -> str | None:
        if call is None:
            return None
        gradient, names = self._training_step.gradient, self._state.names
        return explain(self._model, self._guide, call, self._kwargs, gradient=gradient, names=names)

    def save(self, path: str | PathLike, fit: Fit) -> None:
        """Write the state of the training to a file."""
        checkpoint.write(path, self._state, fit.steps, fit.losses, self._final_random_state or random_state())

    def resume(self, path: str | PathLike, *, with_random_state: bool) -> Tensor:
        """Load the state in a file, its random state too if asked for; return the losses until then."""
        losses, random = checkpoint.restore(path, self._state)
        if with_random_state:
            set_random_state(random)
        return losses
