"""The tables of a factorized guide: made for the rows of a call, read, written, chosen between row by row."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_avi.closing.weight_source import by_row
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide

__all__ = ["Tables", "choose", "read_tables", "table_like", "write_tables"]

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
