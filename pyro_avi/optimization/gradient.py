"""The loss of one step and its gradient, taken eagerly."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_avi.distributed.ranks import Ranks
from pyro_avi.optimization.adam import add_up
from pyro_avi.optimization.precision import matmul_precision

__all__ = ["BackwardGradient", "Gradient", "LossAndGrads", "RowGrads", "averaged", "clipped"]


class RowGrads(NamedTuple):
    """The gradient in the rows of one table that a call has read.

    Attributes:
        table: the name of the table.
        positions: ``[B]`` of the rows, of which one may occur several times; ``None`` for all in order.
        grad: ``[B, P]``; ``None`` where the loss does not depend on them.
    """

    table: str
    positions: Tensor | None
    grad: Tensor | None


@dataclass(frozen=True)
class LossAndGrads:
    """A loss and its gradient at one point.

    Attributes:
        loss: an estimate of the negative ELBO, ``[]``.
        grads: its gradient in each parameter, ``None`` in one that it does not depend on. ``None`` in place of the list
            where the parameters have been moved already.
        rows: the gradients of each table that was read and has not been moved already.
    """

    loss: Tensor
    grads: Sequence[Tensor | None] | None
    rows: list[RowGrads]


class Gradient:
    """Evaluates the loss of a call, and its gradient in the parameters that are trained and no others.

    Args:
        loss: the differentiable loss of a call.
        parameters: what is trained, tables aside.
        touched_rows: makes a context with a list, to which every table that a call reads is added as ``(name, index,
            rows)``, the rows as leaves of the autograd graph. It is given the rows that were gathered before the call, or
            ``None``.
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
            return self.evaluate(self.loss, self.parameters, call, kwargs)

    def evaluate(
        self,
        loss: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        call: tuple,
        kwargs: Mapping[str, Any],
        gathered: Any = None,
    ) -> LossAndGrads:
        """The loss and gradient of one call, for another loss and other parameters than this object's.

        Args:
            loss, parameters: in the place of :attr:`loss` and :attr:`parameters`, as while a graph is traced.
            call, kwargs: the arguments of the loss.
            gathered: rows of tables that were gathered before the call.
        """
        with matmul_precision(self.precision):
            with self.touched_rows(gathered) as touched:
                value = loss(*call, **kwargs)
            grads: tuple[Tensor | None, ...] = torch.autograd.grad(
                value, [*parameters, *(rows for _, _, rows in touched)], allow_unused=True
            )
        row_grads = grads[len(parameters) :]
        rows = [RowGrads(name, index, grad) for (name, index, _), grad in zip(touched, row_grads, strict=True)]
        return LossAndGrads(value.detach(), grads[: len(parameters)], _joined_by_table(rows))


class BackwardGradient(Gradient):
    """The loss and gradient of an ELBO that calls ``backward`` itself and returns a number, as ``TraceGraph_ELBO``.

    Args:
        loss: adds the gradient to that of the parameters and returns the number, or several whose sum is the loss.
        parameters, touched_rows, precision: as for :class:`Gradient`.
        found: all parameters whose gradient it adds to, also those that are not trained.
    """

    def __init__(self, loss, parameters, touched_rows, precision="float32", *, found: Sequence[Tensor]):
        super().__init__(loss, parameters, touched_rows, precision)
        self._found = found

    def evaluate(self, loss, parameters, call, kwargs, gathered=None):
        """As for :class:`Gradient`; ``parameters`` are those of this object."""
        for parameter in self._found:
            parameter.grad = None
        with matmul_precision(self.precision), self.touched_rows(gathered) as touched:
            value = loss(*call, **kwargs)
        result = LossAndGrads(
            torch.as_tensor(sum(value) if isinstance(value, tuple) else value, dtype=torch.double).detach(),
            [parameter.grad for parameter in parameters],
            _joined_by_table([RowGrads(name, index, rows.grad) for name, index, rows in touched]),
        )
        for parameter in self._found:
            parameter.grad = None
        return result


def _joined_by_table(rows: list[RowGrads]) -> list[RowGrads]:
    """The rows that each table was read at, concatenated where several particles have read rows of their own."""
    by_table: dict[str, list[RowGrads]] = {}
    for read in rows:
        if read.grad is not None or read.table not in by_table:
            by_table.setdefault(read.table, []).append(read)
    joined = []
    for table, parts in by_table.items():
        moved = [(index, grad) for _, index, grad in parts if grad is not None]
        if len(moved) > 1:
            indices = [torch.arange(len(grad), device=grad.device) if index is None else index for index, grad in moved]
            joined.append(RowGrads(table, torch.cat(indices), torch.cat([grad for _, grad in moved])))
        else:
            # Without a gradient only where no part has one.
            joined.append(parts[-1])
    return joined


def averaged(result: LossAndGrads, ranks: Ranks, weight: float, norm: float | None) -> LossAndGrads:
    r"""The loss and gradient of the batches of all processes together, clipped.

    .. math:: g = \sum_k w_k g_k / \sum_k w_k

    With the numbers of rows as weights it is the gradient of one process with all their rows. Of rows of tables, which one
    process holds, the gradient is :math:`w_k g_k / \sum_k w_k`, and is not exchanged.

    Args:
        result: the loss and gradient of the batch of this process.
        ranks: the processes.
        weight: of this process, the number of rows in its batch.
        norm: as for :func:`clipped`.
    """
    squares: Tensor | float = 0.0
    for length in () if norm is None else _row_lengths(result):
        squares = squares + length**2 * weight
    grads, (loss, squares), share = ranks.means(result.grads or (), [result.loss, squares], weight)
    rows = [
        read if read.grad is None else read._replace(grad=read.grad * share.to(read.grad.dtype)) for read in result.rows
    ]
    mean = LossAndGrads(loss.to(result.loss.dtype), grads, rows)
    return clipped(mean, norm, [(squares * share / weight).sqrt()])


def clipped(result: LossAndGrads, norm: float | None, row_lengths: Sequence[Tensor] | None = None) -> LossAndGrads:
    """The same with gradients shortened to a norm, that of all parameters and rows together.

    Args:
        result: a loss and its gradient.
        norm: the largest norm, ``None`` for any.
        row_lengths: the norms of the gradients in rows, where other processes hold some of these.

    References:
        Pascanu, Mikolov and Bengio, "On the Difficulty of Training Recurrent Neural Networks", 2013,
        https://arxiv.org/abs/1211.5063.
    """
    if norm is None:
        return result
    lengths = [torch.linalg.vector_norm(grad) for grad in result.grads or () if grad is not None]
    lengths += _row_lengths(result) if row_lengths is None else row_lengths
    factor = (norm / torch.stack(lengths).norm()).clamp(max=1.0)
    return replace(
        result,
        grads=[None if grad is None else grad * factor for grad in result.grads or ()],
        rows=[rows if rows.grad is None else rows._replace(grad=rows.grad * factor) for rows in result.rows],
    )


def _row_lengths(result: LossAndGrads) -> list[Tensor]:
    """The norms of the gradients in rows, those of a row that was read several times added up."""
    # The index is where the table is, which may be in host memory.
    grads = [
        grad if index is None else add_up(index.to(grad.device), grad)[1]
        for _, index, grad in result.rows
        if grad is not None
    ]
    return [torch.linalg.vector_norm(grad) for grad in grads]
