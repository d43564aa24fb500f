"""A number with its standard error."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo estimate in nats.

    Attributes:
        value: the estimate, for the whole data set.
        se: its standard error over the draws; ``nan`` for a single draw.
        rows: ``[B]`` the local part of each row, unscaled.
    """

    value: float
    se: float
    rows: Tensor
