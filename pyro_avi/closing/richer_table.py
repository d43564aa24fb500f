"""A table of a richer family, started as independent normals with the moments of other factors."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pyro_avi.closing.factor_search import moments
from pyro_avi.closing.row_tables import table_like
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.families import Family
from pyro_avi.guides import FactorizedGuide

__all__ = ["richer_table"]


def richer_table(
    model: Callable, best: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any], *, family: Family, seed: int
) -> FactorizedGuide:
    """A table of a richer family, with the moments of the best factors; those of discrete latents as they are.

    Args:
        model: without global latents.
        best: with a table for the rows of the call.
        args, kwargs: of the model.
        family: the richer one.
        seed: of the draws by which moments are measured that have no formula.

    Raises:
        ValueError: if the family has weights that rows share.
    """
    guide = table_like(model, best, args, kwargs, family=family)
    if list(guide.row_factors[0].factor.parameters()):
        raise ValueError(
            f"Expected richer= to be a family of rows alone, got {type(family).__name__}, whose weights rows share.\n"
            "Try one of the following fixes:\n"
            "- a flow whose weights are every row's own: richer=avi.RowFlow()\n"
            "- train a guide with this family, and measure the gaps of that"
        )
    with isolated_sampling(seed), torch.no_grad():
        for row_factor, theirs in zip(guide.row_factors, best.row_factors, strict=True):
            table, narrow = row_factor.function.table, theirs.function.table
            continuous = row_factor.factor.family.initial(*moments(theirs.factor.distribution(narrow)))
            discrete = narrow[:, narrow.shape[1] - (table.shape[1] - continuous.shape[1]) :]
            table.copy_(torch.cat([continuous, discrete], 1))
    return guide
