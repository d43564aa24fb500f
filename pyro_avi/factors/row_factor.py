"""The factor of one set of rows."""

from torch import nn

from pyro_avi.factors.factor import Factor
from pyro_avi.families import Family
from pyro_avi.inspection.structure import RowSet

__all__ = ["RowFactor"]


class RowFactor(nn.Module):
    """The factor of one set of rows and the inference function that gives its parameters.

    Attributes:
        rows: the rows and their latents.
        factor: what samples the latents from parameters ``[*B, P]``.
        function: the inference function.
    """

    def __init__(self, rows: RowSet, family: Family):
        super().__init__()
        self.rows = rows
        self.factor = Factor(f"_{'_'.join(rows.plates)}_latents", rows.latents, rows.frames, family)
        self.function: nn.Module | None = None
