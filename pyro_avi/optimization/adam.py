"""Adam for a parameter as one thing, or with a state for every row of it; the same code eagerly and inside a graph."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Adam", "add_up"]


class Adam:
    r"""Adam that moves a parameter in place, all of it or the rows of a batch.

    .. math:: \lambda_n \leftarrow \lambda_n - \alpha \, \hat m_n / (\sqrt{\hat v_n} + \epsilon)
              \qquad \text{for the rows } n \text{ of the batch}

    By rows, moments and bias corrections count a row's own visits. Dense Adam moves every row at every step, by the
    momentum of batches that are long gone, at a cost that grows with the table. When every row is in every batch the two
    are the same.

    Args:
        parameter: of any shape; by rows ``[N, P]``. It is changed in place.
        rows: whether every row has a state and a step count of its own.
        betas: the decay rates of the two moments.
        eps: the :math:`\epsilon` of the formula.

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
        self, parameter: Tensor, *, rows: bool = False, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        self.parameter, self.betas, self.eps = parameter, betas, eps
        counts = (len(parameter), *(1 for _ in parameter.shape[1:])) if rows else (1,)
        # Of one dimension at least: torch.compile takes a 0-dimensional double for a Python number, and loses what is
        # written to it.
        values = torch.atleast_1d(parameter.detach())
        self.states = [values, torch.zeros_like(values), torch.zeros_like(values), values.new_zeros(counts)]

    @property
    def visits(self) -> Tensor:
        """How often each row was in a batch ``[N, 1]``, or the whole parameter ``[1]``."""
        return self.states[3]

    @torch.no_grad()
    def step(self, index: Tensor | None, grad: Tensor, lr: float) -> None:
        """Move the parameter, or the rows of one batch.

        Args:
            index: ``[B]`` rows ``0 <= n < N``, ``None`` for all in order; where the parameter is. The gradients of a row that
                is there several times are added up: it is visited once.
            grad: ``[B, P]`` the gradient of the loss in their parameters; on any device.
            lr: the learning rate :math:`\\alpha`.
        """
        self.move(self.states, index, grad.to(self.parameter.device), lr)

    def move(self, states: Sequence[Tensor], index: Tensor | None, grad: Tensor, lr: float | Tensor) -> None:
        """The same on states that stand in for the own ones, as when a graph is traced: parameter, moments, visits."""
        if index is not None:
            # Equal rows then have the same gradient, move alike, and may be written in any order.
            index, sums, group = add_up(index, grad)
            grad = sums[group]
        values, first, second, visits = states if index is None else [state[index] for state in states]
        beta1, beta2 = self.betas
        grad = torch.atleast_1d(grad)
        visits.add_(1)
        # What lerp_ does, for which torch.vmap has no rule.
        first.add_(grad - first, alpha=1 - beta1)
        second.add_(grad * grad - second, alpha=1 - beta2)
        # Beside each other, so that a graph computes them once and not for every number that moves.
        size, root = torch.stack([lr / _correction(beta1, visits), _correction(beta2, visits).rsqrt()])
        values.sub_(first / (second.sqrt() * root).add_(self.eps) * size)
        if index is not None:
            for state, new in zip(states, (values, first, second, visits), strict=True):
                # As index_copy_, for which torch.vmap has no rule either.
                state.index_put_((index,), new)


def add_up(index: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add up the gradients of equal rows, in time and memory that grow with ``B`` and not with ``N``.

    Args:
        index: ``[B]`` rows.
        grad: ``[B, P]`` their gradients.

    Returns:
        The rows in order ``[B]``; the sums of each different row ``[B, P]``, behind which zeros follow; and which of the
        sums belongs to each row ``[B]``.

    Example::

        >>> import torch
        >>> index, sums, group = add_up(torch.tensor([5, 2, 5]), torch.tensor([[1.0], [2.0], [3.0]]))
        >>> index.tolist(), sums.flatten().tolist(), group.tolist()
        ([2, 5, 5], [2.0, 4.0, 0.0], [0, 1, 1])
    """
    # Stable, so that a sum has the same order of its terms every time.
    ordered, order = index.sort(stable=True)
    group = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).to(ordered.dtype)]).cumsum(0)
    return ordered, torch.zeros_like(grad).index_put_((group,), grad[order], accumulate=True), group


def _correction(beta: float, visits: Tensor) -> Tensor:
    """One minus the decay rate to the power of the visits; also right where the two are close."""
    return -torch.expm1(visits * (math.log(beta) if beta > 0 else -math.inf))
