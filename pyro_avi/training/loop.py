"""The training loop, and its result."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_avi.checkpoints.file import SavedTraining
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.repetition.stops import CHECK_EVERY, Stops
from pyro_avi.training.clock import Clock
from pyro_avi.training.loss_figure import plot_losses

__all__ = ["DivergedError", "Fit", "finished_fit", "run_steps"]


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number.

    Attributes:
        step: the first step whose loss is not finite.
        loss: that loss.
        reason: what is not finite, in a sentence; ``None`` where it is not known.
        kept: the number of steps that model, guide and optimizer have taken in the state that was restored; ``None`` where
            they are as the last step left them.
        checkpoint: the file with the last finite state that was written, ``None`` where there is none.
    """

    def __init__(
        self, step: int, loss: float, reason: str | None = None, kept: int | None = None, checkpoint: str | None = None
    ):
        lines = [f"Expected finite losses, got {loss} at step {step}.", reason]
        if kept is not None:
            lines.append(
                f"Model, guide and optimizer are as they were after {kept} steps, the last state kept as finite."
            )
        lines.append(
            "Try data of unit scale without nan, a smaller learning rate, or a likelihood whose scale cannot reach zero."
        )
        if checkpoint is not None:
            lines.append(
                f"With that changed, checkpoint= and resume={checkpoint!r} go on from the last finite state that was written."
            )
        super().__init__("\n".join(line for line in lines if line))
        self.step, self.loss, self.reason, self.kept, self.checkpoint = step, loss, reason, kept, checkpoint

    def __reduce__(self):
        return type(self), (self.step, self.loss, self.reason, self.kept, self.checkpoint)


@dataclass
class Fit:
    """The result of a training: its losses, and the time that it took.

    Attributes:
        steps: the number of steps taken.
        compile_seconds: the part of :attr:`seconds` in which steps were compiled.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=40, progress=False)  # doctest: +ELLIPSIS
        Fit(40 steps, mean loss ... ± ... nats in the last 4, ... s)
    """

    steps: int
    _clock: Clock
    _buffer: Tensor
    compile_seconds: float = 0.0
    _save: Callable[[str | PathLike, "Fit"], None] | None = None
    # Whether a callback has ended the training, or it has taken all its steps.
    _ended: bool = False

    def __repr__(self) -> str:
        if not self.steps:
            return "Fit(no step yet)"
        count = max(1, self.steps // 10)
        # One read from the device, of those that are shown.
        recent = self._buffer[self.steps - count : self.steps].cpu()
        if not recent.isfinite().all():
            return f"Fit({counted(self.steps, 'step')}, diverged at step {self.diverged_at:,}, {self.seconds:.3g} s)"
        loss = f"last loss {recent[-1].item():,.6g} nats"
        if count > 1:
            error = recent.std().item() / count**0.5
            loss = f"mean loss {with_error(recent.mean().item(), error)} nats in the last {count:,}"
        return f"Fit({counted(self.steps, 'step')}, {loss}, {self.seconds:.3g} s)"

    def __getstate__(self) -> dict[str, Any]:
        # The function that saves a training holds the model and the guide.
        return {**self.__dict__, "_save": None}

    def save(self, path: str | PathLike) -> None:
        """Write the state of the training to a file, as ``checkpoint=`` of :func:`~pyro_avi.fit` does every so many steps.

        The file holds the parameters and buffers of model and guide as they are now, the state of the optimizer, the number
        of steps, the losses, the times and the random state, in the safetensors format and JSON: reading it runs no code.
        The states of callbacks are in those of ``checkpoint=`` alone. Call it at the end of a training, or in a callback; in
        all processes of a distributed training, of which each writes a file of its own: ``path.0-of-2`` and ``path.1-of-2``,
        with the parameters and moments of the rows that it holds.

        Args:
            path: the file, replaced where it exists, at once or not at all.

        Raises:
            ValueError: if this is the result of one of several trainings at once, or a copy.
            TypeError: if the state of the optimizer is not of tensors and numbers.
        """
        if self._save is None:
            raise ValueError(
                "Expected the Fit that avi.fit returned, to be saved, got one of avi.fit_many or a copy.\n"
                "Save guides by avi.save and models by their state_dict."
            )
        self._save(path, self)

    @property
    def num_steps(self) -> int:
        """The number of steps that were asked for, in all."""
        return len(self._buffer)

    @property
    def seconds(self) -> float:
        """The time that the steps took, without callbacks; reading it waits for the device."""
        return self._clock.read()

    @property
    def times(self) -> Tensor:
        """``[steps]`` the :attr:`seconds` at the end of every step, also of those before the training was resumed.

        The clock is read every 100 steps, and before that after 1, 2, 4, ... Between two readings the time is interpolated.
        """
        taken, (start, *steps), (_, *seconds) = np.arange(1, self.steps + 1), *zip(*self._clock.laps, strict=True)
        now = np.interp(taken, [start, *steps, self.steps], [0.0, *seconds, self.seconds])
        return torch.from_numpy(np.where(taken > start, now, np.nan))

    def plot(self, others: Mapping[str, "Fit"] | None = None, *, name: str = "training"):
        """Draw the loss by step and by second: every loss as a dot, and the medians of sixty groups of steps as a line.

        The axis leaves out the losses of the first steps where they are far from all others.

        Args:
            others: the results of other trainings, by name.
            name: of this training.

        Returns:
            A :class:`matplotlib.figure.Figure`.

        Raises:
            ValueError: if a training has taken no step yet.
        """
        return plot_losses({name: self, **(others or {})})

    @property
    def losses(self) -> Tensor:
        """``[steps]`` the loss of every step, an estimate of the negative ELBO in nats for the whole data set."""
        return self._buffer[: self.steps].cpu()

    @property
    def diverged_at(self) -> int | None:
        """The first step whose loss is not finite, ``None`` where all are."""
        infinite = ~self.losses.isfinite()
        return int(infinite.nonzero()[0]) if infinite.any() else None


def run_steps(
    step: Callable[[int], tuple[Tensor, float]],
    num_steps: int,
    *,
    count: int | None,
    device: torch.device,
    progress: bool,
    callbacks: Sequence[Callable[[Any], Any]],
    many: Callable[[int, int, Tensor], int] = lambda step, most, losses: 0,
    on_finite: Callable[[int], None] = lambda steps: None,
    save: Callable[[str | PathLike, Fit], None] | None = None,
    earlier: SavedTraining | None = None,
    checkpoint: Callable[[Any], None] = lambda fit: None,
    every: int | None = None,
) -> Any:
    """Take the steps of a training.

    Args:
        step: takes the step of a number from 0 on; returns the loss before it, or the losses ``[R]`` of several trainings,
            and the seconds spent in compiling so far.
        num_steps: the number of steps.
        count: ``R``, or ``None`` for one training.
        device: of the losses.
        progress: whether to show a progress bar.
        callbacks: called after every step, or when they want to be, with the result so far, while the clock is stopped;
            ``True`` ends the training.
        many: takes steps from one of a number on, so many at most, writes their losses and returns how many it took; 0 where
            the next one has to be taken by ``step``.
        on_finite: called with the number of steps whenever all losses up to there are known to be finite.
        save: writes the state of the training to a file.
        earlier: the training that this one goes on from, whose steps are among the ``num_steps``.
        checkpoint: called with the result so far after every so many steps and their callbacks, when all losses are known to
            be finite and the clock is stopped; not after the last step.
        every: the number of those steps, ``None`` for never.

    Returns:
        The result of the training, or the list of those of several.

    Raises:
        DivergedError: if no training's loss is finite any more.
    """
    fits, buffer, clock = _begin(num_steps, count, device, save, earlier)
    start, compiled_before = fits[0].steps, fits[0].compile_seconds
    result: Any = fits[0] if count is None else fits
    # On a CPU reading a loss costs nothing, and the first one that is not finite ends the training at once.
    numbers = buffer.numpy() if count is None and device.type == "cpu" else None
    stops, taken, compiling = Stops(callbacks, start, num_steps, every), start, 0.0
    with progress_bar(num_steps, initial=start, unit="step", progress=progress) as bar:
        clock.start()
        while taken < num_steps:
            # Nothing else happens before the next stop.
            steps = many(taken, stops.next(taken) - taken, buffer)
            if not steps:
                buffer[..., taken], compiling = step(taken)
            taken += steps or 1
            writes, calls, last = stops.writes(taken), stops.calls(taken), taken == num_steps
            pauses = calls or writes or last
            if pauses:
                clock.stop()
            for fit in fits:
                fit.steps, fit.compile_seconds = taken, compiled_before + compiling
            if stops.laps(taken):
                clock.lap(taken)
            if writes or (numbers is not None and not math.isfinite(numbers[taken - 1])):
                _check_finite(fits)
            if stops.checks(taken):
                _check_finite(fits)
                on_finite(taken)
                bar.set_postfix(loss=f"{buffer[..., taken - 1].mean().item():.4g}", refresh=False)
                bar.update(taken - bar.n)
            if calls and stops.call(taken, result):
                _check_finite(fits)
                on_finite(taken)
                break
            if writes:
                checkpoint(result)
            if pauses and not last:
                clock.start()
    clock.read()
    for fit in fits:
        fit._ended = True
    return result


def finished_fit(
    earlier: SavedTraining, num_steps: int, device: torch.device, save: Callable[[str | PathLike, Fit], None]
) -> Fit:
    """The result of a training that has nothing left to do.

    Args:
        earlier: the training.
        num_steps: the number of steps.
        device: of the losses.
        save: writes the state of the training to a file.
    """
    (fit,), *_ = _begin(num_steps, None, device, save, earlier)
    fit._ended = True
    return fit


def _begin(
    num_steps: int,
    count: int | None,
    device: torch.device,
    save: Callable[[str | PathLike, Fit], None] | None,
    earlier: SavedTraining | None,
) -> tuple[list[Fit], Tensor, Clock]:
    """The results of trainings before their first step, the losses that they look at, and their clock."""
    shape = (num_steps,) if count is None else (count, num_steps)
    buffer = torch.empty(shape, device=device, dtype=torch.float64)
    if earlier is None:
        start, compiled, clock = 0, 0.0, Clock(device)
    else:
        start, compiled, clock = earlier.steps, earlier.compile_seconds, Clock(device, earlier.laps)
        buffer[..., :start] = earlier.losses
    fits = [Fit(start, clock, losses, compiled, _save=save) for losses in buffer.view(-1, num_steps)]
    return fits, buffer, clock


def _check_finite(fits: Sequence[Fit]) -> None:
    # Of one training those before were checked: to read all again takes as long as a small step.
    if len(fits) == 1 and fits[0]._buffer[max(0, fits[0].steps - CHECK_EVERY) : fits[0].steps].isfinite().all():
        return
    diverged = [(step, fit) for fit in fits if (step := fit.diverged_at) is not None]
    if len(diverged) == len(fits):
        step, last = max(diverged, key=lambda pair: pair[0])
        raise DivergedError(step, last.losses[step].item())
