"""What the tests of the contract of measurements share."""

import re
import warnings

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value

import pyro_avi as avi
from tests.marks import number_of
from tests.measured.brute_force import laplace
from tests.measured_structures import GUIDES, STRUCTURES

__all__ = ["CALLS", "best_table", "cases", "given", "held", "is_known", "make", "near"]

CLASSES = {name: getattr(avi, name) for name in GUIDES}


def cases(measurement, wanted=lambda structure: True, *, kinds=GUIDES, fast=1, one_kind=False):
    """Run a test for structures on which a measurement of a guide is not refused.

    Args:
        measurement: its name.
        wanted: chooses structures.
        kinds: the guides, of which the structure's name decides on one for default runs; slow ones take all.
        fast: of how many structures about one is taken in default runs, by its name.
        one_kind: whether this guide is all.
    """
    found = []
    for name, structure in STRUCTURES.items():
        number, is_fast = number_of(name) // fast, number_of(name) % fast == 0
        for kind in kinds if wanted(structure) else ():
            in_turn = kind == kinds[number % len(kinds)]
            if one_kind and not in_turn:
                continue
            now = is_fast and in_turn
            if measurement in structure.applies and structure.refusal(kind, measurement) is None:
                found.append(pytest.param(kind, name, marks=() if now else pytest.mark.slow, id=f"{kind}, {name}"))
    return pytest.mark.parametrize("kind, name", found)


def make(kind, name, model=None, **options):
    """A model and a guide for it that has seen its arguments."""
    structure = STRUCTURES[name]
    model = model or structure.make()
    own = structure.amortized if kind == "AmortizedGuide" else {}
    encoder = {"encoder": (4,)} if kind == "AmortizedGuide" else {}
    options = {"init_scale": structure.init_scale, **encoder, **structure.options, **own, **options}
    guide = CLASSES[kind](model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guide.setup(*structure.args)
    assert all(re.search(structure.warning or "(?!)", str(warning.message)) for warning in caught), caught
    return model, guide


def held(name):
    """The model of a structure with its global latents at the values that its evidence is given."""
    structure = STRUCTURES[name]
    model = structure.make()
    if not structure.theta:
        return model
    return poutine.block(poutine.condition(model, data=structure.theta), hide=list(structure.theta))


def best_table(name):
    """A table with the normal at the mode of the posterior, which is the posterior where that is in the family."""
    structure = STRUCTURES[name]
    model = held(name)
    mode, moved = laplace(structure)
    _, guide = make("FactorizedGuide", name, model, init_loc_fn=init_to_value(values=mode))
    _, other = make("FactorizedGuide", name, model, init_loc_fn=init_to_value(values=moved))
    for table, further in zip(guide.row_tables().values(), other.row_tables().values(), strict=True):
        count = table.shape[1] // 2
        with torch.no_grad():
            table[:, count:] = (further - table)[:, :count].log()
    return model, guide


def given(structure):
    """What the global latents of a measurement by row are held at."""
    return {"theta": dict(structure.theta)} if structure.theta else {}


CALLS = {
    "log_weights": lambda model, guide, args, structure: avi.log_weights(model, guide, *args, num_samples=2),
    "ais": lambda model, guide, args, structure: avi.ais(
        model, guide, *args, num_chains=4, num_temperatures=3, num_leapfrog=1, **given(structure)
    ),
    "measure_gaps": lambda model, guide, args, structure: avi.measure_gaps(
        model, guide, *args, num_samples=26, num_steps=2, max_rounds=1, **given(structure)
    ),
    "refine": lambda model, guide, args, structure: avi.refine(model, guide, *args, num_steps=2),
    "sbc": lambda model, guide, args, structure: avi.sbc(
        model,
        guide,
        *args,
        num_simulations=2,
        num_samples=20,
        num_steps=2,
        rebuild=structure.rebuild,
        **given(structure),
    ),
    "posterior_predictive": lambda model, guide, args, structure: avi.posterior_predictive(
        model, guide, *args, num_samples=2
    ),
    "to_arviz": lambda model, guide, args, structure: avi.to_arviz(model, guide, *args, num_samples=2),
}


def near(rows, rows_se, exact, *, at_most, resolved=1.0):
    """Compare rows with what is exact, of those whose standard error tells something; a share of them has to.

    Args:
        rows, rows_se: an estimate.
        exact: for each row.
        at_most: the largest standard error that does.
        resolved: the least share of such rows.
    """
    exact = torch.as_tensor(exact, dtype=torch.double)
    assert rows.shape == exact.shape
    known = rows_se < at_most
    assert known.double().mean() >= resolved, rows_se
    wrong = (rows - exact).abs() > 4 * rows_se + 1e-4 * exact.abs() + 1e-5
    assert not (wrong & known).any(), (rows, rows_se, exact)


def is_known(structure):
    """Whether the posterior of every row is that of a table, found by brute force."""
    return structure.is_conjugate and structure.brute_force and structure.blocks is None
