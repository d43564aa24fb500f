"""Adam for tables with a row of parameters for each row of the data: only the rows of the batch move."""

import torch
from torch import Tensor

__all__ = ["RowwiseAdam"]


class RowwiseAdam:
    r"""Adam with a state and a step count for every row of a table.

    .. math:: \lambda_n \leftarrow \lambda_n - \alpha \, \hat m_n / (\sqrt{\hat v_n} + \epsilon)
              \qquad \text{for the rows } n \text{ of the batch}

    with moments and bias corrections that count a row's own visits. Dense Adam moves every row at every step, by the
    momentum of batches that are long gone, at a cost that grows with the table. When every row is in every batch the two
    are the same.

    Args:
        table: ``[N, P]``, changed in place.
        betas: the decay rates of the two moments.
        eps: the :math:`\epsilon` of the formula.

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980.

    Example::

        >>> import torch
        >>> table = torch.zeros(5, 2)
        >>> optimizer = RowwiseAdam(table)
        >>> optimizer.step(torch.tensor([1, 3]), torch.ones(2, 2), lr=0.1)
        >>> [round(value, 4) for value in table[:, 0].tolist()]
        [0.0, -0.1, 0.0, -0.1, 0.0]
    """

    def __init__(self, table: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.table, self.betas, self.eps = table, betas, eps
        self.first, self.second = torch.zeros_like(table), torch.zeros_like(table)
        self.visits = torch.zeros(len(table), 1, dtype=table.dtype, device=table.device)

    @torch.no_grad()
    def step(self, index: Tensor | None, grad: Tensor, lr: float) -> None:
        """Move the rows of one batch.

        Args:
            index: ``[B]`` different rows, ``None`` for all in order.
            grad: ``[B, P]`` the gradient of the loss in their parameters.
            lr: the learning rate :math:`\\alpha`.
        """
        states = (self.table.data, self.first, self.second, self.visits)
        rows, first, second, visits = states if index is None else (state[index] for state in states)
        beta1, beta2 = self.betas
        visits.add_(1)
        first.lerp_(grad, 1 - beta1)
        second.lerp_(grad * grad, 1 - beta2)
        scale = (second / (1 - beta2**visits)).sqrt_().add_(self.eps)
        rows.sub_(first / (1 - beta1**visits) / scale * lr)
        if index is not None:
            for state, new in zip(states, (rows, first, second, visits), strict=True):
                state.index_copy_(0, index, new)
