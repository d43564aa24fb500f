"""Adam with one state for a whole parameter, or with a state for every row of it; eagerly and inside a graph."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Adam", "Moments", "add_up"]


class Moments(NamedTuple):
    """What Adam keeps of a parameter beside its values, by rows or of all of it.

    Attributes:
        first, second: the running means of the gradient and of its square.
        visits: how often each row was in a batch ``[N, 1]``, or the whole parameter was moved ``[1]``.
    """

    first: Tensor
    second: Tensor
    visits: Tensor


class Adam:
    r"""Adam that moves a parameter in place, all of it or the rows of a batch.

    .. math:: \lambda_n \leftarrow \lambda_n - \alpha \, \hat m_n / (\sqrt{\hat v_n} + \epsilon)
              \qquad \text{for the rows } n \text{ of the batch}

    With a state for every row, the moments and bias corrections of a row count the batches that it was in. Dense Adam
    moves every row at every step, by the momentum of batches that are long gone, at a cost that grows with the table. When
    every row is in every batch the two are the same.

    Args:
        parameter: of any shape; by rows ``[N, P]``. It is changed in place.
        rows: whether every row has a state and a step count of its own.
        moments: the memory of what is kept beside the parameter, zeros; by default as the parameter's own.
        betas: the decay rates of the two moments.
        eps: the :math:`\epsilon` of the formula.

    Attributes:
        values: the memory of the parameter, of at least one dimension.
        moments: what is kept beside it.

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980.

    Example::

        >>> import torch
        >>> table = torch.zeros(5, 2)
        >>> optimizer = Adam(table, rows=True)
        >>> optimizer.step(torch.tensor([1, 3]), torch.ones(2, 2), lr=0.1)
        >>> [round(value, 4) for value in table[:, 0].tolist()]
        [0.0, -0.1, 0.0, -0.1, 0.0]
    """

    def __init__(
        self,
        parameter: Tensor,
        *,
        rows: bool = False,
        moments: tuple[Tensor, Tensor, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        self.parameter, self.rows, self.betas, self.eps = parameter, rows, betas, eps
        counts = (len(parameter), *(1 for _ in parameter.shape[1:])) if rows else (1,)
        # Of one dimension at least: torch.compile takes a 0-dimensional double for a Python number, and loses what is
        # written to it.
        self.values = torch.atleast_1d(parameter.detach())
        if moments is None:
            zeros = torch.zeros_like(self.values)
            moments = zeros, zeros.clone(), self.values.new_zeros(counts)
        self.moments = Moments(*moments)

    @torch.no_grad()
    def step(self, index: Tensor | None, grad: Tensor, lr: float) -> None:
        """Move the parameter, or the rows of one batch.

        Args:
            index: ``[B]`` rows ``0 <= n < N``, on the device of the parameter; ``None`` for all in order. The gradients of a
                row that occurs several times are added up, and it is moved once.
            grad: ``[B, P]`` the gradient of the loss with respect to these rows; on any device.
            lr: the learning rate :math:`\\alpha`.
        """
        self.update(self.values, self.moments, index, grad.to(self.parameter.device), lr)

    def update(self, values: Tensor, moments: Moments, index: Tensor | None, grad: Tensor, lr: float | Tensor) -> None:
        """Take the step on other values and moments than this optimizer's, as a graph does while it is traced.

        Args:
            values, moments: of the same shapes, changed in place.
            index, grad, lr: as for :meth:`step`, on the same device.
        """
        own = (values, *moments)
        if index is not None:
            # Equal rows then have the same gradient, move alike, and may be written in any order.
            index, sums, group = add_up(index, grad)
            grad = sums[group]
        values, first, second, visits = own if index is None else [tensor[index] for tensor in own]
        visits.add_(1)
        self.move(values, first, second, grad, self.scales(visits, lr))
        if index is not None:
            for tensor, new in zip(own, (values, first, second, visits), strict=True):
                # As index_copy_, for which torch.vmap has no batching rule either.
                tensor.index_put_((index,), new)

    def scales(self, visits: Tensor, lr: float | Tensor) -> Tensor:
        """The learning rate and the inverse root of the second moment, both corrected for their bias, stacked.

        Args:
            visits: with the one at hand.
            lr: the learning rate.
        """
        beta1, beta2 = self.betas
        # Stacked, so that a graph computes the two numbers once and not for every element of the parameter.
        return torch.stack([lr / _correction(beta1, visits), _correction(beta2, visits).rsqrt()])

    def move(self, values: Tensor, first: Tensor, second: Tensor, grad: Tensor, scales: Tensor) -> None:
        """Move values and moments, in place.

        Args:
            values, first, second: of one shape.
            grad: the gradient.
            scales: see :meth:`scales`.
        """
        beta1, beta2 = self.betas
        size, root = scales
        grad = torch.atleast_1d(grad)
        # As lerp_, for which torch.vmap has no batching rule.
        first.add_(grad - first, alpha=1 - beta1)
        second.add_(grad * grad - second, alpha=1 - beta2)
        values.sub_(first / (second.sqrt() * root).add_(self.eps) * size)


def add_up(index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the gradients of equal rows, in time and memory that grow with ``B`` and not with ``N``.

    Args:
        index: ``[B]`` rows.
        grad: ``[B, P]`` their gradients.

    Returns:
        The rows in ascending order ``[B]``; the sum of every distinct row ``[B, P]``, padded with zeros; and the position of
        each row's sum ``[B]``.

    Example::

        >>> import torch
        >>> index, sums, group = add_up(torch.tensor([5, 2, 5]), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> index.tolist(), sums.flatten().tolist(), group.tolist()
        ([2, 5, 5], [2.0, 4.0, 0.0], [0, 1, 1])
    """
    # Stable, so that the terms of a sum are in the same order every time.
    ordered, order = index.sort(stable=True)
    group = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)]).cumsum(0)
    return ordered, torch.zeros_like(grad).index_put_((group,), grad[order], accumulate=True), group


def _correction(beta: float, visits: Tensor) -> Tensor:
    """One minus the decay rate to the power of the visits; also right where the two are close."""
    return -torch.expm1(visits * (math.log(beta) if beta > 0 else -math.inf))
