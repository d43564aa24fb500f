"""How the rows of a table were refined."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Refinement"]


@dataclass(frozen=True)
class Refinement:
    """What :func:`~pyro_avi.refine` with ``tolerance=`` says of every row of a table.

    Attributes:
        steps: ``[N]`` the steps that the row has taken.
        left: ``[N]`` what its bound may still rise, in nats; an estimate without bias, which may be below zero.
        left_se: ``[N]`` its standard error.
        converged: ``[N]`` whether less than the tolerance is left, at a confidence of 95 %.
    """

    steps: Tensor
    left: Tensor
    left_se: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        steps = self.steps.double().mean().item()
        return (
            f"Refinement({int(self.converged.sum()):,} of {len(self.steps):,} rows converged, {steps:.3g} steps a row)"
        )
