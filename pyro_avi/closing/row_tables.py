"""The tables of a factorized guide: made for the rows of a call, read, written, chosen between row by row."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_avi.closing.remaining_gain import RemainingGain
from pyro_avi.closing.weight_source import by_row
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide
from pyro_avi.rows.refinement import Refinement

__all__ = ["OpenRows", "Tables", "choose", "read_tables", "table_like", "write_tables"]

# The tables of a guide ``[N, P]`` by the names of their rows' plates.
Tables = Mapping[str, Tensor]


def table_like(
    model: Callable,
    guide: LocalGuide,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    family: Family | None = None,
    with_globals: bool = False,
) -> FactorizedGuide:
    """A factorized guide with tables for the rows of a call, for the same latents as another guide.

    Args:
        model: what the guide is for.
        guide: any of the three.
        args, kwargs: the arguments of the model.
        family: another family than that of the guide. In the same one, what rows share of their factors is taken over.
        with_globals: whether the model has global latents; the guide's factor of them is copied.

    Raises:
        ValueError: if the guide is for other latents than the rows of the model have.
    """
    table = FactorizedGuide(
        model,
        plate=guide.row_plates,
        family=family or guide.family,
        global_guide=copy.deepcopy(guide.global_guide) if with_globals else None,
        same_rows=True,
    )
    table.setup(*args, **kwargs)
    table.check_same_latents(guide)
    if family is None:
        for mine, theirs in zip(table.row_factors, guide.row_factors, strict=True):
            mine.factor.load_state_dict(theirs.factor.state_dict())
    return table


def read_tables(guide: FactorizedGuide) -> Tables:
    """Copies of a guide's tables."""
    return {name: table.detach().clone() for name, table in guide.row_tables().items()}


@torch.no_grad()
def write_tables(guide: FactorizedGuide, tables: Tables) -> None:
    """Give a guide the values of its tables, or of one row for all ``[P]``."""
    for name, table in guide.row_tables().items():
        table.copy_(tables[name])


def choose(first: Tensor, one: Tables, other: Tables, blocks: Mapping[str, Tensor] | None) -> Tables:
    """One of two tables for each row.

    Args:
        first: ``[M]`` where the first.
        one, other: the tables.
        blocks: of the source of their log weights.
    """
    of_rows = {name: by_row(first, None if blocks is None else blocks[name]) for name in one}
    return {name: torch.where(of_rows[name].to(table.device), table, other[name]) for name, table in one.items()}


class OpenRows:
    """What is known of the rows of a table of which some take steps.

    Args:
        start: ``[N, P]``.
        tolerance: in nats, what may be left of a row that is done.

    Attributes:
        start, table: ``[N, P]`` where rows began, and where they were when they were done.
        open: ``[N]`` rows that take steps.
        moved: ``[N]`` rows that do not keep their start.
        is_sure: ``[N]`` rows of which that is decided.
        steps: ``[N]`` how many each has taken.
    """

    def __init__(self, start: Tensor, tolerance: float):
        self.start, self.table, self._tolerance = start, start.clone(), tolerance
        self.open = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self.moved, self.steps = torch.zeros_like(self.open), torch.zeros_like(self.open, dtype=torch.long)
        self.is_sure = torch.zeros_like(self.open)
        number = torch.full_like(self.open, torch.nan, dtype=torch.double)
        self.left, self.left_se = number, number.clone()

    def is_little(self, left: RemainingGain) -> Tensor:
        """Whether less than the tolerance is left, at a confidence of 95 %. What is no number is not known to be little."""
        return left.at_most() < self._tolerance

    def close(self, rows: slice | Tensor, done: Tensor, steps: int, left: RemainingGain, table: Tensor | None) -> None:
        """Note that open ones of some rows are done, where they are, ``None`` for at their start."""
        at = _among(self.open, rows, self.open[rows] & done)
        chosen = at[rows]
        self.open[at], self.steps[at], self.moved[at] = False, steps, table is not None
        self.left[at], self.left_se[at] = left.rows[chosen], left.rows_se[chosen]
        if table is not None:
            self.table[at] = table[chosen]

    def decide(self, rows: slice | Tensor, significant: Tensor, gained: RemainingGain, *, is_last: bool) -> None:
        """Keep the factors of rows that have gained; put the others back in the end, and leave their gain to them."""
        self.is_sure |= _among(self.open, rows, significant)
        if is_last:
            at = _among(self.open, rows, (self.moved & ~self.is_sure)[rows])
            chosen = at[rows]
            left = RemainingGain(self.left[at], self.left_se[at]).plus(gained.rows[chosen], gained.rows_se[chosen])
            self.moved[at], self.left[at], self.left_se[at] = False, left.rows, left.rows_se

    def result(self) -> Tensor:
        """``[N, P]``."""
        return torch.where(self.moved.unsqueeze(-1), self.table, self.start)

    def refinement(self) -> Refinement:
        """What to tell."""
        converged = self.is_little(RemainingGain(self.left, self.left_se))
        return Refinement(self.steps, self.left, self.left_se, converged)


def _among(like: Tensor, rows: slice | Tensor, chosen: Tensor) -> Tensor:
    """``[N]`` those chosen of some rows."""
    result = torch.zeros_like(like)
    result[rows] = chosen
    return result
