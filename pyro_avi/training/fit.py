"""Training one model and guide."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import ELBO, Trace_ELBO

from pyro_avi.checkpoints.beginning import Beginnings
from pyro_avi.checkpoints.file import SavedTraining
from pyro_avi.distributed.files import settled
from pyro_avi.distributed.ranks import Ranks
from pyro_avi.distributed.tables import hold_own_rows
from pyro_avi.optimization.losses import forget_averages
from pyro_avi.optimization.step import LearningRate, StepOptions
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import draws_from
from pyro_avi.training.loaders import LoaderRowCheck, arguments_from_batches
from pyro_avi.training.loop import DivergedError, Fit, finished_fit, run_steps
from pyro_avi.training.options import check_keywords, check_optimizer, check_options
from pyro_avi.training.training import Training

__all__ = ["DivergedError", "Fit", "LearningRate", "arguments_by_step", "fit", "next_arguments"]


def fit(
    model: Callable,
    guide: Callable,
    *args,
    num_steps: int,
    batches: Iterable | None = None,
    lr: LearningRate | Mapping[str, LearningRate] = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    elbo: ELBO | None = None,
    clip_norm: float | None = None,
    kl_weight: LearningRate = 1.0,
    precision: str = "float32",
    compile: str | bool = "auto",
    callbacks: Sequence[Callable[[Fit], Any]] = (),
    keep: bool = True,
    checkpoint: str | PathLike | None = None,
    every: int = 1000,
    resume: str | PathLike | None = None,
    distributed: Any = False,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> Fit:
    r"""Minimise the negative ELBO of a model and a guide.

    .. math:: \mathrm{loss} = - E_{q(\theta, z)} \left[ \log p(\theta)
              + \frac{N}{B} \sum_{n \in \mathrm{batch}} \log \frac{p(x_n, z_n \mid \theta)}{q(z_n)} - \log q(\theta) \right]

    Every step draws from the guide once and moves the parameters of model and guide, as ``pyro.infer.SVI`` does.
    Unlike there, modules train their own tensors whatever the global parameter store holds, and the rows of a
    factorized guide's table move only when they are in the batch; the gradients of a row that is there several times are
    added up. Pyro's validation, where it is on, sees the first step. Trainings in several threads wait for each other: Pyro
    has one stack of handlers and torch one random state.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both, the same at every step, where ``batches`` is not given.
        num_steps: the number of steps.
        batches: the positional arguments of each step, for example :func:`~pyro_avi.minibatches` or a
            ``torch.utils.data.DataLoader``. An iterator is used until it ends; a loader, a list of tuples and whatever else
            can be iterated over again is repeated without end. A batch of a loader may also be a list, one tensor, or a
            dictionary of arguments by name. A loader shuffles by ``seed``, even where it has a generator of its own, whose
            state is left as it was. A :class:`~pyro_avi.FactorizedGuide` needs the positions of the rows in a batch:
            ``(x, index)``.
        lr: the learning rate, a number or a function of the step from 0. With ``{"local": ..., "global": ...}`` the
            inference function (encoder, table or vector) has one and everything else (factor of the global latents,
            parameters of the model) has the other; a part that is left out is not trained.
        optimizer: a function that makes a ``torch.optim.Optimizer`` from parameter groups and ``lr=``, for example
            ``torch.optim.AdamW``; it moves all parameters. By default Adam, row by row for tables.
        elbo: one of Pyro's ELBOs or of this library's, which :doc:`/gradients` compares; by default ``Trace_ELBO()``. Where
            it has several losses, as ``ReweightedWakeSleep``, their sum is recorded. Networks that serve as baselines of
            ``TraceGraph_ELBO`` are trained where they are registered, as submodules of model or guide or by ``pyro.module``.
        clip_norm: the largest norm of the gradient of all parameters together; by default it is not clipped.
        kl_weight: of :math:`\log q - \log p` of all latents in the loss, a number or a function of the step from 0. One that
            rises from 0 to 1 over the first steps is a warm-up, which keeps latents from being given up before the model
            uses them (:doc:`/recipes`); one that stays at another number is that of a beta-VAE. Losses are those with the
            weight. For ``Trace_ELBO``, ``TraceMeanField_ELBO``, :class:`~pyro_avi.StickingTheLandingELBO` and
            :class:`~pyro_avi.ScoreFunctionELBO`.
        precision: of matrix products and convolutions: ``"float32"``, that of the tensors given; ``"bfloat16"`` rounds
            their factors to 8 significant bits and leaves sums, activations, densities and parameters as they are;
            ``"tf32"`` rounds to 11 bits, on CUDA only.
        compile: ``True`` to take a step as one compiled graph: loss, gradient and Adam. A step then takes about half the time,
            after ten seconds to a minute of compiling. It needs a C++ compiler, parameters that belong to modules, and one of
            ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO`` and this library's, all but
            :class:`~pyro_avi.RaoBlackwellizedELBO`. A step that cannot be traced, or whose graph gives another gradient, is
            taken eagerly, with a warning that says why. Arguments of other shapes than the first ones, as the last batch of a
            loader's epoch, have graphs too in trainings of some thousand steps, and are eager steps in shorter ones; batches of
            ``minibatches`` are of one shape. ``"auto"``: compiled where that is possible and the steps to go, by a count of
            their operations, save more time than compiling takes; where it would and is not possible, the logger ``pyro_avi``
            says why. ``False``: eager. A graph rounds sums differently.
        callbacks: functions that are called after every step with the :class:`Fit` so far, while the clock is stopped; one
            that returns ``True`` ends the training. See :class:`~pyro_avi.Validation`. One with a method
            ``next_call(steps)``, which returns after how many steps in all it needs to be called next, lets the small steps
            until then be taken in one call (:doc:`/training`).
        keep: whether to keep a copy of the last finite state, which is restored when the training diverges. It needs the
            memory of parameters and optimizer a second time. Copying takes at most 1 % of the time, so that of a large model
            the copy is older. Of a guide with ``rows_on="disk"`` nothing is copied; its rows are never moved by what is not
            finite.
        checkpoint: a file to which the training is written every so many steps and at its end, and from which it goes on where
            the file is there: a program that is killed and started again comes to the numbers of one that never stopped,
            compiled or not. The file holds all that decides them: parameters, buffers, optimizer, random state, the place in
            the batches, losses and times, and the states of callbacks that have ``state_dict`` and ``load_state_dict`` (other
            callbacks are called from there on). Batches must come in the same order again, as those of the library and of
            loaders do; an iterator is passed in its first state. Random states other than torch's are not kept. The training
            of a finished file is returned at once; more ``num_steps`` go on from it. One process at a time has a file.
        every: the number of steps between two times that ``checkpoint`` is written.
        resume: a file of a training, written by ``checkpoint=`` or :meth:`Fit.save`, whose state is gone on from whatever the
            other arguments are: a smaller learning rate, mended data, another optimizer's ``lr``. ``num_steps`` counts from
            the beginning, and so do the batches. Beside ``checkpoint`` it serves where that file is not there, or is this one.
        distributed: ``True`` to train one model by all processes of ``torch.distributed``, or a group of them, as started by
            ``torchrun``; every process calls ``fit``. Each has batches of its own, as ``avi.minibatches(...,
            distributed=True)`` gives them; gradients are averaged by the batches' numbers of rows, so that a step is that of
            one process with all their rows. Process 0 gives the initial values of what the processes share: model, encoder,
            factor of the global latents. Of a :class:`~pyro_avi.FactorizedGuide`'s rows process ``k`` of ``K`` holds, trains
            and saves ``k, k + K, ...``; see :func:`~pyro_avi.gather_tables`. An error in one process ends all.
        seed: the seed of the draws, with which the program's random state is left as it was; ``None`` to draw from that
            state. Of several processes each draws from a seed of its own, made of this one.
        progress: whether to show a progress bar, which appears after the first second; of several processes the first
            shows it.

    Returns:
        The losses and times of the training. Model and guide are trained in place, also when interrupted.

    Raises:
        ValueError, TypeError: if an argument is not one of the above, model and guide have other latents, batches run out, or
            the file of ``checkpoint`` is damaged or of a training by other arguments, data or batches.
        DivergedError: if the loss is no longer finite; it says what was first not finite, and in which state model and guide
            are left.
        RuntimeError: if another process of a distributed training has raised an error; it says which, and what.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model, encoder=(32,))
        >>> result = avi.fit(model, guide, batches=avi.minibatches(x, batch_size=5), num_steps=8, progress=False)
        >>> result.losses.shape
        torch.Size([8])
    """
    elbo, ranks = Trace_ELBO() if elbo is None else elbo, Ranks(distributed)
    checkpoint, resume = settled(checkpoint, ranks), settled(resume, ranks)
    with ranks.together("the checks before a training"):
        check_options(num_steps, elbo, lr, clip_norm, precision, compile, kl_weight)
        check_optimizer(optimizer)
        check_keywords(model, kwargs)
        files = Beginnings(checkpoint, every, resume, num_steps=num_steps, seed=seed)
        hold_own_rows(ranks, guide, optimizer)
        calls = arguments_by_step(args, batches, model, ranks.seed(seed))
        first = next_arguments(calls, 0, num_steps)  # Refused before any work is done.
    with isolated_param_store(), warnings.catch_warnings(), draws_from(ranks.seed(seed)):
        forget_averages()
        # Pyro would warn at every step of what DivergedError says once.
        warnings.filterwarnings("ignore", "Encountered NaN")
        with ranks.together("the first evaluation of the loss"):
            training = Training(
                model,
                guide,
                elbo,
                first,
                kwargs,
                num_steps=num_steps,
                keep=keep,
                options=StepOptions(optimizer, lr, clip_norm, precision, compile, kl_weight),
                callbacks=callbacks,
                seed=seed,
                ranks=ranks,
            )
        training.start_alike(callbacks=len(callbacks), clip_norm=clip_norm, keep=keep, files=(bool(checkpoint), every))
        with ranks.together("what comes before the first step"):
            if checkpoint is not None or resume is not None:
                training.check_in_memory()
            start, earlier, beginning = 0, None, files.choose(training.settings)
            if beginning is not None:
                start = beginning.saved.steps
                if not (finished := beginning.is_finished(num_steps)):
                    beginning.check_last(training.hash_of(_pass_over(calls, first, start, num_steps)))
                earlier = training.go_on(beginning)
                if finished:
                    return finished_fit(earlier, num_steps, training.device, training.save)
            rows = LoaderRowCheck(batches, guide, kwargs, start=start)
            rest = map(rows.check, _rest(calls, max(start, 1), num_steps))
            # The check needs a guide that has been set up, as it is by now.
            training.follow(rest if start else itertools.chain([rows.check(first)], rest), calls)
        training.on_finite(start)
        # It holds a second copy of the state.
        del beginning
        return _run(
            training, ranks, files, earlier, num_steps=num_steps, callbacks=callbacks, every=every, progress=progress
        )


def _run(
    training: Training,
    ranks: Ranks,
    files: Beginnings,
    earlier: SavedTraining | None,
    *,
    num_steps: int,
    callbacks: Sequence[Callable[[Fit], Any]],
    every: int,
    progress: bool,
) -> Fit:
    """Take the steps to go, and write the file of the training at their end."""
    try:
        result = run_steps(
            training.step,
            num_steps,
            count=None,
            device=training.device,
            callbacks=ranks.callbacks(callbacks),
            many=training.many_steps,
            on_finite=training.on_finite,
            save=training.save,
            earlier=earlier,
            checkpoint=partial(training.save_finite, files.path),
            every=None if files.path is None else every,
            progress=progress and ranks.rank == 0,
        )
    except DivergedError as error:
        raise training.diverged(error) from None
    training.finish(result)
    training.save_finite(files.path, result)
    return result


@runtime_checkable
class CanSkip(Protocol):
    """An iterator of batches that can pass over some of them without making them."""

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        ...


def _pass_over(calls: Iterator[tuple], first: tuple, start: int, num_steps: int) -> tuple:
    """Pass over the batches of the steps taken before, of which the first has been taken already; the last of them."""
    last, taken = first, min(start, 1)
    if isinstance(calls, CanSkip) and start > 1:
        calls.skip(start - 2)
        taken = start - 1
    for step in range(taken, start):
        last = next_arguments(calls, step, num_steps)
    return last


def _rest(calls: Iterator[tuple], start: int, num_steps: int) -> Iterator[tuple]:
    for step in itertools.count(start):
        yield next_arguments(calls, step, num_steps)


def arguments_by_step(args: tuple, batches: Iterable | None, model: Callable, seed: int | None) -> Iterator[tuple]:
    """The positional arguments of every step: the same for all, or one batch after another."""
    if batches is None:
        return itertools.repeat(args)
    if args:
        raise ValueError("Expected the arguments of the model either for all steps or as batches=, got both.")
    return arguments_from_batches(batches, model, seed)


def next_arguments(calls: Iterator[tuple], step: int, num_steps: int) -> tuple:
    """The positional arguments of the next step, of ``num_steps``."""
    call = next(calls, None)
    if call is None:
        raise ValueError(
            f"Expected batches for {num_steps} steps, got {step}.\nPass what has no end, as avi.minibatches(...), or can be "
            "iterated over again, as a list or a DataLoader."
        )
    if not isinstance(call, tuple):
        raise TypeError(
            f"Expected every batch to be a tuple of the model's positional arguments, got {type(call).__name__}."
        )
    return call
