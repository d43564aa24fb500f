"""The loss of one step and its gradient, taken eagerly."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_avi.optimization.adam import add_up
from pyro_avi.optimization.precision import matmul_precision

__all__ = ["Gradient", "LossAndGrads", "BackwardGradient", "clipped"]


@dataclass(frozen=True)
class LossAndGrads:
    """A loss and its gradient at one point.

    Attributes:
        loss: an estimate of the negative ELBO, ``[]``.
        grads: its gradient in each parameter, ``None`` in one that it does not depend on. In place of all of them
            ``None`` where the parameters have been moved already.
        rows: for each table that was read the name, the index ``[B]`` (``None`` for all rows; one may be there several
            times) and the gradient ``[B, P]``; without the tables that have been moved already.
    """

    loss: Tensor
    grads: Sequence[Tensor | None] | None
    rows: list[tuple[str, Tensor | None, Tensor | None]]


class Gradient:
    """Evaluates the loss of a call and its gradient in what is trained and in nothing else.

    Args:
        loss: the differentiable loss of a call.
        parameters: what is trained, tables aside.
        touched_rows: a context that gives the rows of the tables that a call reads, as leaves of the graph, from those
            gathered before the call or ``None``.
        precision: of matrix products, see :func:`~pyro_avi.optimization.precision.matmul_precision`.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        touched_rows: Callable[[Any], AbstractContextManager[list]],
        precision: str = "float32",
    ):
        self.loss, self.parameters, self.touched_rows = loss, list(parameters), touched_rows
        self.precision = precision

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> LossAndGrads:
        """The loss and gradient of one call."""
        # Pyro's checks ran when the parameters were found; what they would find later makes the loss infinite.
        with pyro.validation_enabled(False):
            return self.of(self.loss, self.parameters, call, kwargs)

    def of(
        self,
        loss: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        call: tuple,
        kwargs: Mapping[str, Any],
        gathered: Any = None,
    ) -> LossAndGrads:
        """The same for a loss and parameters that stand in for the own ones, and rows of tables gathered before."""
        with matmul_precision(self.precision):
            with self.touched_rows(gathered) as touched:
                value = loss(*call, **kwargs)
            grads = torch.autograd.grad(value, [*parameters, *(rows for _, _, rows in touched)], allow_unused=True)
        of_rows = grads[len(parameters) :]
        rows = [(name, index, grad) for (name, index, _), grad in zip(touched, of_rows, strict=True)]
        return LossAndGrads(value.detach(), grads[: len(parameters)], _one_a_table(rows))


class BackwardGradient(Gradient):
    """The same of an ELBO that takes its gradient itself and gives its loss as a number, as ``TraceGraph_ELBO``.

    Args:
        loss: takes the gradient and gives the number, or several of which the sum is the loss.
        parameters, touched_rows, precision: as for :class:`Gradient`.
        found: all that a gradient is taken of, also of what is not trained.
    """

    def __init__(self, loss, parameters, touched_rows, precision="float32", *, found: Sequence[Tensor]):
        super().__init__(loss, parameters, touched_rows, precision)
        self._found = found

    def of(self, loss, parameters, call, kwargs, gathered=None):
        """As for :class:`Gradient`; ``parameters`` are the own ones."""
        for parameter in self._found:
            parameter.grad = None
        with matmul_precision(self.precision), self.touched_rows(gathered) as touched:
            value = loss(*call, **kwargs)
        result = LossAndGrads(
            torch.as_tensor(sum(value) if isinstance(value, tuple) else value, dtype=torch.double).detach(),
            [parameter.grad for parameter in parameters],
            _one_a_table([(name, index, rows.grad) for name, index, rows in touched]),
        )
        for parameter in self._found:
            parameter.grad = None
        return result


def _one_a_table(
    rows: list[tuple[str, Tensor | None, Tensor | None]],
) -> list[tuple[str, Tensor | None, Tensor | None]]:
    """The rows that each table was read at, one behind another where particles have drawn rows of their own."""
    read: dict[str, list] = {}
    for name, index, grad in rows:
        if grad is not None or name not in read:
            read.setdefault(name, []).append((index, grad))
    joined = []
    for name, parts in read.items():
        parts = [part for part in parts if part[1] is not None] or parts[:1]
        if len(parts) > 1:
            every = [torch.arange(len(grad), device=grad.device) if index is None else index for index, grad in parts]
            parts = [(torch.cat(every), torch.cat([grad for _, grad in parts]))]
        joined.append((name, *parts[0]))
    return joined


def clipped(result: LossAndGrads, norm: float | None) -> LossAndGrads:
    """The same with gradients shortened to a norm, that of all parameters and rows together.

    Args:
        slope: a loss and its gradient.
        norm: the largest norm, ``None`` for any.

    References:
        Pascanu, Mikolov and Bengio, "On the Difficulty of Training Recurrent Neural Networks", 2013,
        https://arxiv.org/abs/1211.5063.
    """
    if norm is None:
        return result
    # The index is where the table is, which may be in host memory.
    of_rows = [
        grad if index is None else add_up(index.to(grad.device), grad)[1]
        for _, index, grad in result.rows
        if grad is not None
    ]
    grads = [*(grad for grad in result.grads if grad is not None), *of_rows]
    length = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()
    factor = (norm / length).clamp(max=1.0)
    return replace(
        result,
        grads=[None if grad is None else grad * factor for grad in result.grads],
        rows=[(name, index, None if grad is None else grad * factor) for name, index, grad in result.rows],
    )
