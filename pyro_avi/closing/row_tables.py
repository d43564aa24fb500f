"""The tables of a factorized guide: made for the rows of a call, read, written, chosen between row by row."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_avi.closing.weight_source import by_row
from pyro_avi.guides import FactorizedGuide
from pyro_avi.guides.local_guide import LocalGuide

__all__ = ["Tables", "check_latents", "choose", "read_tables", "table_like", "write_tables"]

# The tables of a guide ``[N, P]`` by the names of their rows' plates.
Tables = Mapping[str, Tensor]


def table_like(model: Callable, guide: LocalGuide, args: tuple, kwargs: Mapping[str, Any]) -> FactorizedGuide:
    """A guide with tables for the rows of a call, whose factors are those of another guide where rows share parts of them.

    Args:
        model: what the guide is for.
        guide: any of the three; its factor of the global latents is copied.
        args, kwargs: the arguments of the model.
    """
    table = FactorizedGuide(
        model,
        plate=guide.row_plates,
        family=guide.family,
        global_guide=copy.deepcopy(guide.global_guide),
        same_rows=True,
    )
    table.setup(*args, **kwargs)
    check_latents(table, guide)
    for row_factor, theirs in zip(table.row_factors, guide.row_factors, strict=True):
        # What rows share in a family is the model of their factors: it is taken over, and frozen with the globals.
        row_factor.factor.load_state_dict(theirs.factor.state_dict())
    return table


def check_latents(mine: LocalGuide, theirs: LocalGuide) -> None:
    """Refuse another guide that misses latents of the rows, or has more of them.

    Args:
        mine: the guide made for a model.
        theirs: the guide given with that model.
    """
    needed, given = (
        [sorted(latent.name for latent in row_factor.rows.latents) for row_factor in guide.row_factors]
        for guide in (mine, theirs)
    )
    if needed != given:
        raise ValueError(
            f"Expected a guide for the latents {needed} of the model's rows, got one for {given}.\n"
            "Pass the model that the guide was made for."
        )


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
    of_rows = {name: by_row(first, blocks and blocks[name]) for name in one}
    return {name: torch.where(of_rows[name].to(table.device), table, other[name]) for name, table in one.items()}
