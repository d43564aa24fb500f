"""Training several models and guides at once."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_avi.compilation.fallback import log_graph, reason_of
from pyro_avi.compilation.module_slots import in_modules
from pyro_avi.optimization.step import StepOptions, TrainingStep
from pyro_avi.optimization.vmapped_step import COMPILE_ERRORS, SequentialStep, VmappedStep
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import as_seed, seeded
from pyro_avi.training.fit import LearningRate, arguments_by_step, next_arguments
from pyro_avi.training.loaders import LoaderRowCheck, check_not_shared
from pyro_avi.training.loop import Fit, run_steps
from pyro_avi.training.options import check_keywords, check_options

__all__ = ["fit_many"]


def fit_many(
    replicas: Sequence[tuple[Callable, Callable]],
    *args,
    num_steps: int,
    batches: Sequence[Iterable] | Iterable | None = None,
    lr: LearningRate | Mapping[str, LearningRate] | Sequence = 1e-3,
    elbo: ELBO | None = None,
    clip_norm: float | None = None,
    precision: str = "float32",
    callbacks: Sequence[Callable[[list[Fit]], Any]] = (),
    seed: int | Sequence[int] | None = 0,
    progress: bool = True,
    **kwargs,
) -> list[Fit]:
    r"""Train several models and guides of one structure at once: seeds, learning rates, data sets of one size.

    .. math:: (\lambda_r, \theta_r) \leftarrow \mathrm{step}(\lambda_r, \theta_r; x_r, \epsilon_r), \qquad r = 1, \dots, R

    One compiled graph takes the step of all replicas, vectorized over them. Each has the draws of its own seed, so that its
    result is that of :func:`~pyro_avi.fit` alone, but for rounding. It saves time where a step is small: calling its operations
    then takes longer than their arithmetic, and is done once for all replicas.

    Args:
        replicas: pairs of a model and a guide that differ in the values of their parameters alone, and share none.
        *args, **kwargs: the arguments of all, the same at every step, where ``batches`` is not given.
        num_steps: the number of steps.
        batches: as for :func:`~pyro_avi.fit`, a list with an iterable for each replica, of the same shapes for all, or one
            ``DataLoader``, which each replica iterates over by its own seed. A tensor that all replicas share is not copied.
        lr: the learning rate as for :func:`~pyro_avi.fit`, one for all or a list with one for each.
        elbo: ``Trace_ELBO`` (by default), ``TraceMeanField_ELBO`` or :class:`~pyro_avi.StickingTheLandingELBO`.
        clip_norm: the largest norm of the gradient of a replica.
        precision: of matrix products, as for :func:`~pyro_avi.fit`.
        callbacks: functions that are called after every step with the list of the fits so far, while the clock is stopped;
            one that returns ``True`` ends the training.
        seed: the seed of the draws, one for all or a list with one for each; ``None`` for one drawn from the random state of
            the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        The losses and times of every replica's training; ``seconds`` are those of all together. A replica whose loss is no
        longer finite does not stop the others: its :attr:`Fit.diverged_at` says where. Replicas that cannot be trained in one
        graph take their steps one after another, with a warning that says why.

    Raises:
        ValueError: if replicas share a parameter, have parameters outside of modules, or the numbers of replicas,
            learning rates, seeds and batches differ.
        DivergedError: if no replica's loss is finite any more.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> models = [avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20) for _ in range(2)]
        >>> replicas = [(model, avi.AmortizedGuide(model)) for model in models]
        >>> fits = avi.fit_many(replicas, x, num_steps=3, seed=[0, 1], progress=False)
        >>> [fit.losses.shape for fit in fits]
        [torch.Size([3]), torch.Size([3])]
    """
    elbo = Trace_ELBO() if elbo is None else elbo
    count = len(replicas)
    rates = _for_each("lr", lr, count)
    seeds = _for_each("seed", as_seed(seed) if seed is None else seed, count)
    for (model, _), rate in zip(replicas, rates, strict=True):
        check_options(num_steps, elbo, rate, clip_norm, precision, True)
        check_keywords(model, kwargs)
    batches = _for_each("batches", batches, count)
    check_not_shared(batches)
    calls = [
        arguments_by_step(args, own, model, own_seed)
        for (model, _), own, own_seed in zip(replicas, batches, seeds, strict=True)
    ]
    rows = [LoaderRowCheck(own, guide, kwargs) for (_, guide), own in zip(replicas, batches, strict=True)]
    first = [next_arguments(own, 0, num_steps) for own in calls]
    with isolated_param_store(), warnings.catch_warnings(), seeded(None):
        # Pyro would warn at every step of what diverged_at says once.
        warnings.filterwarnings("ignore", "Encountered NaN")
        training_steps = []
        for (model, guide), rate, own_seed, call in zip(replicas, rates, seeds, first, strict=True):
            # Modules of one class have the same names in the store. Parameters that the first call creates are those that
            # fit alone would create.
            with pyro.get_param_store().scope(), seeded(own_seed):
                options = StepOptions(None, rate, clip_norm, precision, compile=True)
                training_steps.append(
                    TrainingStep(model, guide, elbo, options=options, num_steps=num_steps, call=call, kwargs=kwargs)
                )
        _check_parameters(training_steps, replicas)
        for check, call in zip(rows, first, strict=True):
            check.check(call)
        steps = _together(training_steps, seeds, first, kwargs)

        def take(step: int) -> tuple[Tensor, float]:
            now = first
            if step > 0:
                now = [
                    check.check(next_arguments(own, step, num_steps)) for check, own in zip(rows, calls, strict=True)
                ]
            return steps.step(step, now, kwargs), steps.seconds

        device = training_steps[0].device
        try:
            return run_steps(take, num_steps, count=count, device=device, callbacks=callbacks, progress=progress)
        finally:
            steps.release()


def _together(
    training_steps: Sequence[TrainingStep], seeds: Sequence[int], calls: Sequence[tuple], kwargs: Mapping[str, Any]
) -> VmappedStep | SequentialStep:
    """The step of all replicas: one graph where that is possible, elsewhere one after another, with a warning."""
    try:
        return VmappedStep(training_steps, seeds, calls, kwargs)
    except COMPILE_ERRORS as reason:
        warnings.warn(f"The replicas take their steps one after another: {reason_of(reason)}.", stacklevel=3)
        log_graph("The training step of all replicas", reason_of(reason))
        return SequentialStep(training_steps, seeds)


def _for_each(name: str, given: Any, count: int) -> Sequence:
    """One option for each replica; what is no list is the same for all."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        given = [given] * count
    if count < 1 or len(given) != count:
        raise ValueError(f"Expected at least one replica and one {name} for each, got {count} and {len(given)}.")
    return given


def _check_parameters(training_steps: Sequence[TrainingStep], replicas: Sequence[tuple[Callable, Callable]]) -> None:
    for position, (replica, pair) in enumerate(zip(training_steps, replicas, strict=True)):
        if not in_modules(replica.parameters, pair):
            raise ValueError(
                f"Expected parameters that belong to modules, got others in replica {position}.\n"
                "Use pyro.nn.PyroModule for what pyro.param holds now, or train the replicas by avi.fit."
            )
    for (one, first), (two, second) in itertools.combinations(enumerate(training_steps), 2):
        if {id(p) for p in first.parameters} & {id(p) for p in second.parameters}:
            raise ValueError(
                f"Expected replicas with parameters of their own, got some that replicas {one} and {two} share.\n"
                "Make a model and a guide for each, or copy.deepcopy both together."
            )
