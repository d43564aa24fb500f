"""A number with its standard error, and the log weights that it is estimated from."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_avi.display.formatting import counted, with_error

__all__ = ["Estimate", "HasLogWeights", "MeanOfRows", "check_log_weights"]


class HasLogWeights(Protocol):
    """What estimators read of :class:`~pyro_avi.LogWeights`, whose attributes these are."""

    @property
    def local(self) -> Tensor:
        """``[S, M]`` the log weights of every block of rows, unscaled."""
        ...

    @property
    def global_(self) -> Tensor:
        """``[S]`` the log weights of all that belongs to no block."""
        ...

    @property
    def total(self) -> Tensor:
        """``[S]`` the log weights of the whole data set."""
        ...

    @property
    def scale(self) -> float:
        """What one block stands for in a sum over the data."""
        ...

    @property
    def has_globals(self) -> bool:
        """Whether blocks share latents."""
        ...

    @property
    def is_estimate(self) -> bool:
        """Whether a block's density is itself an estimate."""
        ...


class MeanOfRows(NamedTuple):
    """An estimate for the whole data set, divided by the number of its rows.

    Attributes:
        value: in nats a row.
        se: its standard error over the draws.
        bias: as that of the estimate.
    """

    value: float
    se: float
    bias: float = 0.0

    def __repr__(self) -> str:
        return f"MeanOfRows({_in_nats(self)} a row)"


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate in nats.

    Attributes:
        value: the estimate, for the whole data set.
        se: its standard error over the draws; ``nan`` for a single draw.
        rows: ``[B]`` the local part of each row, unscaled.
        rows_se: ``[B]`` their standard errors.
        bias: an estimate of how far the expectation of ``value`` lies from what it estimates; 0 where it is unbiased.
        rows_bias: ``[B]`` the same for the rows; ``None`` where they are unbiased.
        scale: ``N / B``, what one of the rows stands for in ``value``.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> avi.Estimate(value=-80.8412, se=0.0312, rows=torch.zeros(12))
        Estimate(-80.841 ± 0.031 nats, 12 rows)
        >>> avi.Estimate(value=-80.8412, se=0.0312, rows=torch.zeros(12)).per_row
        MeanOfRows(-6.7368 ± 0.0026 nats a row)
    """

    value: float
    se: float
    rows: Tensor
    rows_se: Tensor | None = None
    bias: float = 0.0
    rows_bias: Tensor | None = None
    scale: float = 1.0

    def __repr__(self) -> str:
        return f"Estimate({_in_nats(self)}, {counted(self.rows.numel(), 'row')})"

    @property
    def per_row(self) -> MeanOfRows:
        """Value, standard error and bias, divided by the number ``N`` of rows (of blocks, if rows are tied).

        With global latents it includes the global part, divided by ``N``.
        """
        count = self.scale * self.rows.numel()
        return MeanOfRows(self.value / count, self.se / count, self.bias / count)


def _in_nats(estimate: Estimate | MeanOfRows) -> str:
    bias = f", bias about {estimate.bias:.1g}" if estimate.bias else ""
    return f"{with_error(estimate.value, estimate.se)} nats{bias}"


def check_log_weights(weights: HasLogWeights) -> Tensor:
    """The local log weights ``[S, B]`` in double precision, if those of every row can be reduced.

    Args:
        weights: from :func:`~pyro_avi.log_weights`. A weight of zero, ``-inf``, is a weight like any other.

    Raises:
        ValueError: if there is no draw, a weight is ``nan`` or infinite, or no draw of a row has a weight above zero.
    """
    local = weights.local.double()
    if local.dim() != 2 or not len(local):
        raise ValueError(f"Expected log weights of shape [S, B] with S of at least 1, got {tuple(local.shape)}.")
    wrong = (
        (local.isnan() | (local == torch.inf)).any(0),
        "nan or infinite: the density of the model is no number there",
    )
    empty = ((local == -torch.inf).all(0), "zero for every draw: the guide's draws lie outside of the model's support")
    for rows, what in (wrong, empty):
        if rows.any():
            raise ValueError(
                f"Expected finite log weights, got rows {rows.nonzero().flatten()[:5].tolist()} ({int(rows.sum())} of "
                f"{len(rows)}) whose weights are {what}.\n"
                "Look at these rows for missing values, or at the scale of the likelihood; train the guide with a smaller "
                "learning rate if they were finite before."
            )
    return local
