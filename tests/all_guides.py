"""The guides of the library, by name, for tests that hold of each of them."""

import functools
import inspect
from collections.abc import Iterable

import pytest

from pyro_avi import guides
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from tests.discovery import classes_in

_CLASSES = classes_in(guides, LocalGuide)

# As few steps and points as show what a guide does.
_FEW = {"num_steps": 1, "num_points": 2}


def _few(guide: type, **options):
    """A guide with small options, of those that it has."""
    known = inspect.signature(guide).parameters
    given = {name: value for name, value in {**_FEW, **options}.items() if name in known}
    return functools.partial(guide, **given) if given else guide


GUIDES = {name.removesuffix("Guide").lower(): _few(guide) for name, guide in _CLASSES.items()}

# The same by their classes, with a small encoder.
SMALL_GUIDES = {name: _few(guide, encoder=(4,)) for name, guide in _CLASSES.items()}


def mostly_slow(names: Iterable[str]) -> list:
    """Cases of a test by guides.

    One of them runs the model several times a call, and slow runs test of it what all share.
    """
    return [pytest.param(name, marks=pytest.mark.slow) if "semiamortized" in name.lower() else name for name in names]


# For tests that train.
TO_TRAIN = mostly_slow(GUIDES)

# Those whose encoder reads the rows.
READING = frozenset(name for name, guide in _CLASSES.items() if "encoder" in inspect.signature(guide).parameters)


def takes(kind: str, *, family: Family | None = None, discrete: bool = False) -> bool:
    """Whether a guide of a class takes a family, and discrete latents.

    One that takes steps refuses what it has no natural gradient of.
    """
    if "num_steps" not in inspect.signature(_CLASSES[kind]).parameters:
        return True
    return not discrete and (family is None or type(family).__name__ in ("DiagonalNormal", "MultivariateNormal"))
