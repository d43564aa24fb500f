"""The sanitizer: a site whose density is given to other rows than those it depends on is found and named."""

import dataclasses
import re

import pytest
import torch

import pyro_avi as avi
from pyro_avi.densities import attribution
from pyro_avi.densities.kept import Kept
from tests.measured.cases import cases, make
from tests.measured_structures import STRUCTURES


def moved_to_the_globals(owners):
    return torch.full_like(owners, -1)


def shifted_by_a_row(owners):
    return torch.where(owners < 0, owners, (owners + 1) % (owners.max() + 1))


class Dropped(attribution.Owners):
    """Elements that nobody owns."""

    def sums(self, value):
        blocks, rest = super().sums(value)
        return None if blocks is None else 0 * blocks, rest


def wrong(found, of_guide, i):
    """An attribution in which the elements of one factor belong elsewhere, three times."""
    owners = found.owners[of_guide][i]
    others = [
        attribution.Owners(change(owners.blocks), found.num_blocks)
        for change in (moved_to_the_globals, shifted_by_a_row)
    ]
    for other in (*others, Dropped(owners.blocks, found.num_blocks)):
        parts = [list(part) for part in found.owners]
        parts[of_guide][i] = other
        yield dataclasses.replace(found, owners=tuple(parts))


@cases("log_weights", one_kind=True)
def test_a_site_that_is_attributed_wrongly_is_caught(kind, name, monkeypatch):
    structure = STRUCTURES[name]
    model, guide = make(kind, name)
    find, change = attribution._find, [None]

    def changed(call):
        found = find(call)
        return found if change[0] is None else change[0](call, found)

    monkeypatch.setattr(attribution, "_find", changed)
    # Nothing is kept: the rows are searched at every call.
    monkeypatch.setattr(attribution, "_KEPT", Kept(max_bytes=0))
    depending = []

    def look(call, found):
        everything = {plates: torch.ones_like(blocks, dtype=torch.bool) for plates, blocks in found.blocks.items()}
        again = call.with_changed(everything)
        for of_guide, factors in enumerate((call.model_factors, call.guide_factors)):
            for i, factor in enumerate(factors):
                if not call.same(factor.value, again[of_guide][i].value).all():
                    depending.append((of_guide, i, factor.sites))
        return found

    change[0] = look
    avi.log_weights(model, guide, *structure.args, num_samples=1)
    if not guide.row_plates:
        # What is one row for want of rows can only be left out.
        depending = [(0, i, [site]) for i, site in enumerate(guide.global_latents)]
    assert depending

    for of_guide, i, sites in depending:
        for k in range(3):
            if k < 2 and not guide.row_plates or k == 1 and len(structure.evidence) == 1:
                continue
            change[0] = lambda call, found, of_guide=of_guide, i=i, k=k: list(wrong(found, of_guide, i))[k]
            with pytest.raises(ValueError, match=f"(?s)Expected.*'{re.escape(sites[0])}'"):
                avi.log_weights(model, guide, *structure.args, num_samples=1)
