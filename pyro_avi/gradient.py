"""The loss of one step and its gradient, taken eagerly."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Gradient", "Slope"]


@dataclass(frozen=True)
class Slope:
    """A loss and its gradient at one point.

    Attributes:
        loss: an estimate of the negative ELBO, ``[]``.
        grads: its gradient in each parameter, ``None`` in one that it does not depend on.
        rows: for each table that was read the name, the index ``[B]`` (``None`` for all rows) and the gradient ``[B, P]``.
    """

    loss: Tensor
    grads: Sequence[Tensor | None]
    rows: list[tuple[str, Tensor | None, Tensor | None]]


class Gradient:
    """Evaluates the loss of a call and its gradient in what is trained and in nothing else.

    Args:
        loss: the differentiable loss of a call.
        parameters: what is trained, tables aside.
        touched_rows: a context that gives the rows of the tables that a call reads, as leaves of the graph.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        touched_rows: Callable[[], AbstractContextManager[list]],
    ):
        self.loss, self.parameters, self.touched_rows = loss, list(parameters), touched_rows

    def __call__(self, call: tuple, kwargs: Mapping[str, Any]) -> Slope:
        """The loss and gradient of one call."""
        return self.of(self.loss, self.parameters, call, kwargs)

    def of(
        self, loss: Callable[..., Tensor], parameters: Sequence[Tensor], call: tuple, kwargs: Mapping[str, Any]
    ) -> Slope:
        """The same for a loss and parameters that stand in for the own ones."""
        with self.touched_rows() as touched:
            value = loss(*call, **kwargs)
        grads = torch.autograd.grad(value, [*parameters, *(rows for _, _, rows in touched)], allow_unused=True)
        of_rows = grads[len(parameters) :]
        rows = [(name, index, grad) for (name, index, _), grad in zip(touched, of_rows, strict=True)]
        return Slope(value.detach(), grads[: len(parameters)], rows)
