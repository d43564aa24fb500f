"""The only training loop."""

import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_avi.compiled import CompiledGradient
from pyro_avi.gradient import Gradient
from pyro_avi.parameters import own_parameters
from pyro_avi.rowwise import RowwiseAdam

__all__ = ["DivergedError", "Fit", "HasLocalParameters", "HasRowTables", "LearningRate", "fit"]

LearningRate = float | Callable[[int], float]


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number.

    Attributes:
        step: the first step whose loss is not finite.
    """

    def __init__(self, step: int, loss: float):
        super().__init__(
            f"Expected finite losses, got {loss} at step {step}.\n"
            "Try data of unit scale without nan, a smaller learning rate, or a likelihood whose scale cannot reach zero."
        )
        self.step = step


@runtime_checkable
class HasLocalParameters(Protocol):
    """A guide that tells the parameters of its inference function from those of the global latents."""

    def local_parameters(self) -> list[nn.Parameter]:
        """The parameters of the inference function."""
        ...


@runtime_checkable
class HasDifferentiableLoss(Protocol):
    """An ELBO that gives its loss as a tensor; some of Pyro's take their gradients themselves."""

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The loss of one step."""
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

    def touched_rows(self) -> Any:
        """A context that gives a list, filled by every call of the guide with ``(name, index, rows)``.

        ``rows [B, P]`` is a leaf of the graph that stands for the rows ``index`` of the table of that name, ``None`` for
        all in order.
        """
        ...


@dataclass
class Fit:
    """The course of a training.

    Attributes:
        steps: the number of steps taken.
        seconds: the time they took, device synchronized, callbacks excluded.
        losses: ``[steps]`` the loss of every step, an estimate of the negative ELBO in nats for the whole data set.
    """

    steps: int
    seconds: float
    _buffer: Tensor

    @property
    def losses(self) -> Tensor:
        """``[steps]`` the loss of every step."""
        return self._buffer[: self.steps].cpu()


# How often losses are read from the device to be checked.
_CHECK_EVERY = 100


def fit(
    model: Callable,
    guide: Callable,
    *args,
    num_steps: int,
    batches: Iterable[tuple] | None = None,
    lr: LearningRate | Mapping[str, LearningRate] = 1e-3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    elbo: ELBO | None = None,
    seed: int = 0,
    precision: str = "float32",
    compile: str | bool = "auto",
    progress: bool = True,
    callbacks: Sequence[Callable[[Fit], Any]] = (),
    **kwargs,
) -> Fit:
    r"""Minimise the negative ELBO of a model and a guide.

    .. math:: \mathrm{loss} = - E_{q(\theta, z)} \left[ \log p(\theta)
              + \frac{N}{B} \sum_{n \in \mathrm{batch}} \log \frac{p(x_n, z_n \mid \theta)}{q(z_n)} - \log q(\theta) \right]

    Every step draws from the guide once and moves the parameters of model and guide, as ``pyro.infer.SVI`` does.
    Unlike there, modules train their own tensors whatever the global parameter store holds, and the rows of a
    factorized guide's table move only when they are in the batch. Pyro's validation, where it is on, sees the first step.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both, the same at every step, where ``batches`` is not given.
        num_steps: the number of steps.
        batches: the positional arguments of each step, for example :func:`~pyro_avi.minibatches`.
        lr: the learning rate, a number or a function of the step from 0. With ``{"local": ..., "global": ...}`` the
            inference function (encoder, table or vector) has one and everything else (factor of the global latents,
            parameters of the model) has the other; what is left out is not trained.
        optimizer: makes a ``torch.optim.Optimizer`` for all parameters from parameter groups and ``lr=``, for example
            ``torch.optim.AdamW``. By default Adam, row by row for tables.
        elbo: one of Pyro's ELBOs; by default ``Trace_ELBO()``.
        seed: of the draws, ``None`` for those of the surrounding program. The global random state is left as it was.
        precision: ``"float32"``, that of the tensors given.
        compile: ``True`` to evaluate loss and gradient by one compiled graph for each shape of the arguments, about twice as
            fast after some ten seconds to a minute of compiling; it needs a C++ compiler, a reparameterized guide and one
            of ``Trace_ELBO`` and ``TraceMeanField_ELBO``, and falls back to eager steps with a warning that says why.
            ``False`` and, so far, ``"auto"``: steps are taken eagerly.
        progress: whether to show a progress bar.
        callbacks: called after every step with the :class:`Fit` so far, off the clock; ``True`` ends the training.

    Returns:
        The course of the training. Model and guide are trained in place, also when interrupted.

    Raises:
        ValueError: if an argument is not one of the above, or batches run out.
        DivergedError: if the loss is no longer finite.

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
    elbo = Trace_ELBO() if elbo is None else elbo
    _check(num_steps, elbo, precision, compile)
    calls = _calls(args, batches)
    first = _next(calls, 0, num_steps)
    with own_parameters(), warnings.catch_warnings(), _seeded(seed) if seed is not None else nullcontext():
        # What Pyro warns of at every step, DivergedError says once.
        warnings.filterwarnings("ignore", "Encountered NaN")
        trained = _Trained(model, guide, elbo, optimizer, lr, compile is True, first, kwargs)
        device = trained.device
        course = Fit(0, 0.0, torch.empty(num_steps, device=device, dtype=torch.float64))
        with tqdm(total=num_steps, disable=not progress, unit="step") as bar:
            started = _now(device)
            for step in range(num_steps):
                call = first if step == 0 else _next(calls, step, num_steps)
                # Pyro's checks ran when the parameters were found; what they would find later makes the loss infinite.
                with pyro.validation_enabled(False):
                    course._buffer[step] = trained.step(step, call, kwargs)
                course.steps = step + 1
                if course.steps % _CHECK_EVERY == 0 or course.steps == num_steps:
                    _check_finite(course)
                    bar.set_postfix(loss=f"{course._buffer[step].item():.4g}", refresh=False)
                    bar.update(course.steps - bar.n)
                if callbacks:
                    course.seconds += _now(device) - started
                    ended = [callback(course) is True for callback in callbacks]
                    started = _now(device)
                    if any(ended):
                        _check_finite(course)
                        break
            course.seconds += _now(device) - started
    return course


class _Trained:
    """The parameters of one training and how a step moves them."""

    def __init__(self, model, guide, elbo, optimizer, lr, compiled, call, kwargs):
        def loss(*args, **kwargs):
            return elbo.differentiable_loss(model, guide, *args, **kwargs)

        parameters = _find_parameters(loss, call, kwargs)
        self.device = parameters[0].device
        groups = _split(parameters, guide, lr)
        self._tables = {}
        if optimizer is None and isinstance(guide, HasRowTables):
            for name, table in guide.row_tables().items():
                for group, rate in groups:
                    if any(parameter is table for parameter in group):
                        self._tables[name] = RowwiseAdam(table), rate
            of_tables = {id(table) for table in guide.row_tables().values()}
            groups = [([p for p in group if id(p) not in of_tables], rate) for group, rate in groups]
        groups = [(group, rate) for group, rate in groups if group]
        self._parameters = [parameter for group, _ in groups for parameter in group]
        self._rates = [rate for _, rate in groups]
        self._optimizer = None
        if groups:
            make = partial(torch.optim.Adam, fused=True) if optimizer is None else optimizer
            self._optimizer = make(
                [{"params": group, "lr": _at(rate, 0)} for group, rate in groups], lr=_at(self._rates[0], 0)
            )
        self._check_rows = guide.check_rows if self._tables else lambda *args, **kwargs: None
        touched_rows = guide.touched_rows if self._tables else lambda: nullcontext([])
        self._gradient = Gradient(loss, self._parameters, touched_rows)
        if compiled:
            self._gradient = CompiledGradient(self._gradient, model, guide, elbo)

    def step(self, step: int, call: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Move the parameters; return the loss before."""
        self._check_rows(*call, **kwargs)
        slope = self._gradient(call, kwargs)
        if self._optimizer is not None:
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = _at(rate, step)
            for parameter, grad in zip(self._parameters, slope.grads, strict=True):
                parameter.grad = grad
            self._optimizer.step()
            for parameter in self._parameters:
                parameter.grad = None
        for name, index, grad in slope.rows:
            table, rate = self._tables[name]
            if grad is not None:
                table.step(index, grad, _at(rate, step))
        return slope.loss


def _find_parameters(loss: Callable, call: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    with _seeded(None), poutine.trace(param_only=True) as capture:
        loss(*call, **kwargs)
    found = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
    parameters = list({id(parameter): parameter for parameter in found if parameter.requires_grad}.values())
    if not parameters:
        raise ValueError("Expected a model or a guide with parameters to train, found none.")
    return parameters


def _split(parameters, guide, lr) -> list[tuple[list[Tensor], LearningRate]]:
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


def _at(rate: LearningRate, step: int) -> float:
    return rate(step) if callable(rate) else rate


def _check(num_steps: int, elbo: ELBO, precision: str, compile: str | bool) -> None:
    if not isinstance(elbo, HasDifferentiableLoss):
        raise TypeError(
            f"Expected an ELBO with a differentiable_loss, as Trace_ELBO or TraceMeanField_ELBO, got {type(elbo).__name__}.\n"
            "Train with it by pyro.infer.SVI."
        )
    if num_steps < 1:
        raise ValueError(f"Expected num_steps of at least 1, got {num_steps}.")
    if precision != "float32":
        raise ValueError(f"Expected precision='float32', the only one there is, got {precision!r}.")
    if compile not in ("auto", True, False):
        raise ValueError(f"Expected compile to be 'auto', True or False, got {compile!r}.")


def _calls(args: tuple, batches: Iterable[tuple] | None) -> Iterator[tuple]:
    if batches is None:
        return itertools.repeat(args)
    if args:
        raise ValueError("Expected the arguments of the model either for all steps or as batches=, got both.")
    return iter(batches)


def _next(calls: Iterator[tuple], step: int, num_steps: int) -> tuple:
    call = next(calls, None)
    if call is None:
        raise ValueError(
            f"Expected batches for {num_steps} steps, got {step}.\nPass an endless iterable, for example avi.minibatches(...)."
        )
    if not isinstance(call, tuple):
        raise TypeError(
            f"Expected every batch to be a tuple of the model's positional arguments, got {type(call).__name__}."
        )
    return call


def _check_finite(course: Fit) -> None:
    losses = course._buffer[: course.steps]
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        raise DivergedError(step, losses[step].item())


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
