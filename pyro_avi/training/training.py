"""One training: its calls, its state, and what becomes of both when it diverges, is saved, or goes on."""

import math
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor

from pyro_avi.inspection.data_errors import NoRowsError, explain_data_errors
from pyro_avi.optimization.divergence import explain
from pyro_avi.optimization.step import TrainingStep
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
        **options: as for :class:`~pyro_avi.optimization.step.TrainingStep`.

    Raises:
        DivergedError: if model and guide cannot be run on the first call, whose data or whose parameters are not finite.
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
        **options,
    ):
        self._model, self._guide, self._calls, self._kwargs = model, guide, calls, kwargs
        self._start, self._first = start, next(calls)
        try:
            with explain_data_errors(self._first, kwargs):
                self._training_step = TrainingStep(
                    model, guide, elbo, num_steps=num_steps - start, call=self._first, kwargs=kwargs, **options
                )
        except NoRowsError:
            raise
        except ValueError as error:
            # What torch's validation says of nan, it says of no site.
            reason = explain(model, guide, self._first, kwargs)
            if reason is None:
                raise
            raise DivergedError(0, math.nan, reason) from error
        self.device = self._training_step.device
        self._state = TrainingState(self._training_step, model, guide)
        self._backup = StateBackup(self._state) if keep else None
        # Since the losses were last checked: the one that was not finite is among them.
        self._recent: dict[int, tuple] = {}
        self._left: list[Tensor] | None = None

    def take(self, step: int) -> tuple[Tensor, float]:
        """Take a step; return the loss before and the seconds spent in compiling so far."""
        call = self._first if step == self._start else next(self._calls)
        if self.device.type == "cpu":
            self._recent.clear()
        self._recent[step] = call
        loss = self._training_step.step(step, call, self._kwargs)
        return loss, 0.0 if self._training_step.compiled is None else self._training_step.compiled.seconds

    def checked(self, steps: int) -> None:
        """All losses of so many steps are finite."""
        self._recent.clear()
        if self._backup is not None:
            self._backup.keep(steps)

    def leave(self, fit_result: Fit) -> None:
        """End: the random state is kept for a training that goes on.

        Raises:
            DivergedError: if the last step has moved parameters to what is not finite.
        """
        self._left = random_state()
        if not are_finite(self._state.parameters()):
            raise self.diverged(DivergedError(fit_result.steps, math.nan))

    def diverged(self, error: DivergedError) -> DivergedError:
        """The error with what came first; the state that was kept is given back."""
        call, reason = self._recent.get(error.step), None
        if self.device.type == "cpu" or self._training_step.compiled is not None:
            # Nothing has moved by that loss.
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
        given = {"gradient": self._training_step.gradient, "names": self._state.names}
        return explain(self._model, self._guide, call, self._kwargs, **given)

    def save(self, path: str | PathLike, fit_result: Fit) -> None:
        """Write all that the training goes on from to a file."""
        checkpoint.write(path, self._state, fit_result.steps, fit_result.losses, self._left or random_state())

    def go_on(self, path: str | PathLike, *, draws: bool) -> Tensor:
        """Take the state in a file, and with ``draws`` its random state; return the losses until then."""
        losses, random = checkpoint.restore(path, self._state)
        if draws:
            set_random_state(random)
        return losses
