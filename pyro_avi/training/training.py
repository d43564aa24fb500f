"""One training: its steps and its state, and how it ends, diverges, is saved and is resumed."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import pyro
from torch import Tensor

from pyro_avi.checkpoints.beginning import Beginning
from pyro_avi.checkpoints.file import SavedTraining, check_same_tensors, write
from pyro_avi.checkpoints.settings import digest, named, plain_part, rates_by_step
from pyro_avi.distributed.files import make_way, own_file
from pyro_avi.distributed.ranks import Ranks
from pyro_avi.distributed.start import start_alike
from pyro_avi.inspection.data_errors import NoRowsError, explain_data_errors
from pyro_avi.optimization.divergence import are_finite, explain, wrong_parameters
from pyro_avi.optimization.losses import is_average, running_averages
from pyro_avi.optimization.step import StepOptions, TrainingStep
from pyro_avi.repetition.many_steps import ManySteps
from pyro_avi.seeds import random_state, set_random_state
from pyro_avi.training.loop import DivergedError, Fit
from pyro_avi.training.training_state import HasState, StateBackup, TrainingState

__all__ = ["Training"]


class Training:
    """Takes the steps of a model and a guide.

    Args:
        model, guide, elbo: what is trained, and by which loss.
        first: the positional arguments of the first step.
        kwargs: those by keyword.
        num_steps: the number of steps in all.
        keep: whether to keep a copy of the last finite state.
        options: how a step moves the parameters.
        callbacks: whose states are in checkpoints.
        seed: of the draws.
        ranks: the processes that train together, of which this is one.

    Raises:
        DivergedError: if model and guide cannot be run on the first call because its data or their parameters are not
            finite.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        elbo: Any,
        first: tuple,
        kwargs: Mapping[str, Any],
        *,
        num_steps: int,
        keep: bool,
        options: StepOptions,
        callbacks: Sequence[Callable],
        seed: int | None,
        ranks: Ranks,
    ):
        self._ranks = ranks
        self._model, self._guide, self._elbo, self._kwargs = model, guide, elbo, kwargs
        self._first, self._options, self._num_steps, self._seed = first, options, num_steps, seed
        self._callbacks: list[HasState] = []
        for callback in callbacks:
            if isinstance(callback, HasState):
                self._callbacks.append(callback)
        try:
            with explain_data_errors(first, kwargs):
                self._training_step = TrainingStep(
                    model,
                    guide,
                    elbo,
                    num_steps=num_steps,
                    call=first,
                    kwargs=kwargs,
                    options=options,
                    ranks=None if ranks.alone else ranks,
                )
        except NoRowsError:
            raise
        except ValueError as error:
            # torch's validation reports a nan without the name of its site.
            reason = explain(model, guide, first, kwargs)
            if reason is None:
                raise
            raise DivergedError(0, math.nan, reason) from error
        self.device = self._training_step.device
        ranks.check_device(self.device)
        self._state = TrainingState(self._training_step, model, guide)
        self._backup = StateBackup(self._state) if keep and not self._training_step.on_disk else None
        # By step, those since the losses were last checked: a loss that is not finite comes from one of them.
        self._recent: dict[int, tuple] = {}
        self._start, self._last = 0, first
        self._last_hash: str | None = None  # Where it is known.
        self._final: tuple[list[Tensor], dict[str, Tensor]] | None = None
        self._checkpoint: str | None = None

    def settings(self, callbacks: bool = True) -> dict[str, Any]:
        """What decides the numbers of the training, as plain data.

        Args:
            callbacks: whether callbacks with a state are among it.
        """
        optimizer, options = self._training_step.optimizer, self._options
        weight = self._training_step.kl_weight
        given = optimizer.defaults if optimizer is not None and options.optimizer is not None else {}
        own = {name: value for name, value in vars(self._elbo).items() if not name.startswith(("_", "max_plate"))}
        return {
            "model": named(self._model),
            "guide": named(self._guide),
            "elbo": {"class": named(self._elbo)} | plain_part(own),
            "lr": rates_by_step(self._training_step.rates, self._num_steps),
            "optimizer": {"class": self._state.optimizer_class()} | plain_part(given) | {"lr": None},
            "clip_norm": options.clip_norm,
            "kl_weight": weight and rates_by_step(lambda step: [weight.at(step)], self._num_steps),
            "precision": options.precision,
            "compile": options.compile,
            "seed": self._seed,
            "device": self.device.type,
            "callbacks": [named(callback) for callback in self._callbacks if callbacks],
            "the first batch": self._first_hash,
            "the keyword arguments": digest(dict(self._kwargs)),
        }

    def go_on(self, beginning: Beginning) -> SavedTraining:
        """Load the state in a file; of this training itself, with the states of its callbacks.

        Returns:
            What the file holds, without the state.

        Raises:
            ValueError: if the file is of another model, guide or optimizer. Then nothing has changed.
        """
        path, saved = beginning.path, beginning.saved
        if saved.optimizer != self._state.optimizer_class():
            raise ValueError(
                f"Expected the optimizer {saved.optimizer} of the training at {path}, got {self._state.optimizer_class()}.\n"
                "Pass the same optimizer= that it was begun with."
            )
        values = {name: value for name, value in saved.values.items() if not is_average(name)}
        check_same_tensors(path, "parameters and buffers", values, self._state.values())
        check_same_tensors(path, "state of Adam", saved.moments, self._state.moments())
        self._state.load(values, saved.moments, saved.optimizer_state)
        for name in saved.values.keys() - values.keys():
            pyro.get_param_store()[name] = saved.values[name].to(self.device)
        if self._seed is not None:
            set_random_state(saved.random)
        if beginning.own:
            for callback, state in zip(self._callbacks, saved.callbacks, strict=True):
                callback.load_state_dict(state)
        self._start, self._last_hash, self._checkpoint = saved.steps, saved.last, str(path)
        return replace(saved, values={}, moments={}, optimizer_state=None, callbacks=[])

    def follow(self, calls: Iterator[tuple], source: Iterator[tuple]) -> None:
        """Take the arguments of the steps to go from an iterator, which takes them from a source one by one."""
        self._calls = calls
        self._many = ManySteps(self._training_step, source, self._kwargs, alone=self._ranks.alone)

    def hash_of(self, call: tuple) -> str:
        """A hash of the arguments of a step."""
        return self._first_hash if call is self._first else digest(call)

    @cached_property  # Of data that are the same at every step it is taken once.
    def _first_hash(self) -> str:
        return digest(self._first)

    def start_alike(self, **options: Any) -> None:
        """Begin with the values of process 0 in all processes, once they have agreed that they train the same.

        Args:
            **options: what must be the same in all of them, as plain data.
        """
        names, parameters = self._state.names, self._training_step.gradient.parameters
        description = {
            "parameters": {names[id(x)]: tuple(x.shape) for x in parameters},
            "steps": self._num_steps,
            "options": options,
        }
        shared = self._state.shared()
        start_alike(self._ranks, self._guide, self._first, self._kwargs, description=description, shared=shared)

    def step(self, step: int) -> tuple[Tensor, float]:
        """Take a step; return the loss before it and the seconds spent in compiling so far."""
        with self._ranks.step(step, self._training_step.gradient.parameters):
            call = self._last = next(self._calls)
            self._last_hash = None
            if self.device.type == "cpu":
                self._recent.clear()
            self._recent[step] = call
            loss = self._many.single(step, call)
        return loss, 0.0 if self._training_step.compiled is None else self._training_step.compiled.seconds

    def many_steps(self, step: int, most: int, losses: Tensor) -> int:
        """Take steps in one call as far as that is possible; see :class:`~pyro_avi.repetition.many_steps.ManySteps`."""
        if taken := self._many.take(step, most, losses):
            self._last, self._last_hash = self._many.call or (), None
            self._recent = {step + taken - 1: self._last}
        return taken

    def on_finite(self, steps: int) -> None:
        """Back the state up, now that all losses of so many steps are known to be finite."""
        self._recent.clear()
        if self._backup is not None:
            self._backup.update(steps, self._ranks.all)

    def finish(self, fit: Fit) -> None:
        """Record what other trainings change: the random state, from which a resumed training draws on, and running averages.

        Raises:
            DivergedError: if the last step has moved parameters to nan or infinity.
        """
        self._final = random_state(), running_averages()
        self._ranks.broadcast(self._state.buffers())
        if not self._ranks.all(are_finite(self._state.parameters_in_memory())):
            raise self.diverged(DivergedError(fit.steps, math.nan))

    def diverged(self, error: DivergedError) -> DivergedError:
        """The error with its first cause; the state is that of the backup from now on."""
        call, reason = self._recent.get(error.step), None
        if self.device.type == "cpu" or self._training_step.compiled is not None:
            # Such a loss moves nothing: the parameters are those that it was evaluated at.
            reason = wrong_parameters(self._state.parameters_in_memory(), error.step, self._start) or self._explain(
                call
            )
        backup, kept = self._backup, None
        if backup is not None and backup.step is not None:
            backup.restore()
            reason, kept = reason or self._explain(call), backup.step
        return DivergedError(error.step, error.loss, self._first_reason(reason), kept, self._checkpoint)

    def _first_reason(self, reason: str | None) -> str | None:
        """The reason that this process has found, or else another one: it may lie in the rows of that one."""
        reasons = self._ranks.gather(reason)
        found = [f"{other} (In process {rank}.)" for rank, other in enumerate(reasons) if other is not None]
        return reason if reason is not None or not found else found[0]

    def _explain(self, call: tuple | None) -> str | None:
        if call is None:
            return None
        gradient, names = self._training_step.gradient, self._state.names
        return explain(self._model, self._guide, call, self._kwargs, gradient=gradient, names=names)

    def check_in_memory(self) -> None:
        """Refuse a training that a file cannot hold.

        Raises:
            ValueError: if it has tables on disk.
        """
        if self._training_step.on_disk:
            raise ValueError(
                "Expected tables in memory, for a training in a file, got rows_on='disk': a table on disk is not copied, and "
                "goes on from where it is.\nSave the guide by avi.save and the model by its state_dict at the end of a "
                "training; the next one begins with them, and with new moments."
            )

    def save(self, path: str | PathLike, fit: Fit) -> None:
        """Write the state of the training to a file, without the states of callbacks.

        Raises:
            ValueError: if it has tables on disk.
        """
        self.check_in_memory()
        self._write(own_file(path, self._ranks), fit, callbacks=False)

    def save_finite(self, path: Path | None, fit: Fit) -> None:
        """Write the checkpoint of the training where it has one, unless its state is not finite: then the last one stays."""
        if path is not None and self._ranks.all(are_finite(self._state.parameters() | self._state.moments())):
            self._write(path, fit, callbacks=True)
            self._checkpoint = str(path)

    def _write(self, path: Path, fit: Fit, *, callbacks: bool) -> None:
        with self._ranks.together("writing the training"):
            saved = self._saved(fit, callbacks=callbacks)
            make_way(path, self._ranks)
            write(path, saved)

    def _saved(self, fit: Fit, *, callbacks: bool) -> SavedTraining:
        random, averages = self._final or (random_state(), running_averages())
        return SavedTraining(
            steps=fit.steps,
            num_steps=fit.num_steps,
            ended=fit._ended,
            settings=self.settings(callbacks),
            last=self._last_hash or self.hash_of(self._last),
            values=self._state.values() | averages,
            moments=self._state.moments(),
            optimizer=self._state.optimizer_class(),
            optimizer_state=self._state.optimizer_state(),
            losses=fit.losses,
            laps=fit._clock.laps_until(fit.steps),
            compile_seconds=fit.compile_seconds,
            random=random,
            callbacks=[dict(callback.state_dict()) for callback in self._callbacks if callbacks],
        )
