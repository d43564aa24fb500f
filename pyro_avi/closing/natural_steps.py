"""Steps along the natural gradient of every row: what tables of variational parameters are moved by."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["LEAST_FISHER", "NaturalSteps"]

# A direction without information about it would be moved without end.
LEAST_FISHER = 1e-6


class NaturalSteps(torch.optim.Optimizer):
    r"""Moves the parameters of every row along its natural gradient, by no more than a share of its factor's own scale.

    .. math:: \lambda_{np} \leftarrow \lambda_{np}
              - \mathrm{clip} \left( \alpha \, g_{np} / F_{np}, \, \pm \, r / \sqrt{F_{np}} \right)

    where :math:`g_n` is the gradient of a row's loss and :math:`F_n` the diagonal of the Fisher information of its factor: the
    location of a normal moves in units of its own standard deviation. The clip is for factors that are far from the
    posterior, whose scales say little about it. Adam divides by the size of the gradient instead, and takes as long a step in
    a coordinate whose gradient is all noise as in one that the bound depends on.

    Args:
        groups: parameter groups, as for every optimizer of torch.
        lr: :math:`\alpha`, at least 0.
        fisher: by the ``id`` of a parameter the function from its values to the diagonal ``[N, P]``.
        clip: :math:`r`.

    References:
        Amari, "Natural gradient works efficiently in learning", 1998, https://doi.org/10.1162/089976698300017746. Hoffman,
        Blei, Wang and Paisley, "Stochastic variational inference", 2013, https://arxiv.org/abs/1206.7051.

    Example::

        >>> import torch
        >>> table = torch.zeros(3, 2, requires_grad=True)
        >>> optimizer = NaturalSteps([table], lr=0.5, fisher={id(table): lambda values: torch.full((3, 2), 4.0)}, clip=1.0)
        >>> table.grad = torch.tensor([[1.0, -2.0], [0.0, 0.0], [100.0, 4.0]])
        >>> optimizer.step()
        >>> table.tolist()
        [[-0.125, 0.25], [0.0, 0.0], [-0.5, -0.5]]
    """

    def __init__(
        self,
        groups: Iterable,
        *,
        lr: float,
        fisher: Mapping[int, Callable[[Tensor], Tensor]],
        clip: float = 1.0,
    ):
        super().__init__(groups, {"lr": lr})
        self._fisher, self._clip = fisher, clip

    @torch.no_grad()
    # torch declares two signatures, one of them for a closure.
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: not used; every optimizer of torch takes one.
        """
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                fisher = self._fisher[id(table)](table).clamp(min=LEAST_FISHER)
                longest = self._clip * fisher.rsqrt()
                table.sub_((group["lr"] * table.grad / fisher).clamp(-longest, longest))
