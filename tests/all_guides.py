"""The guides of the library, by name, for tests that hold of each of them."""

import functools
import inspect

from pyro_avi import guides
from pyro_avi.guide_bases.local_guide import LocalGuide
from tests.discovery import classes_in

_CLASSES = classes_in(guides, LocalGuide)


def _has_encoder(guide: type) -> bool:
    return "encoder" in inspect.signature(guide).parameters


GUIDES = {name.removesuffix("Guide").lower(): guide for name, guide in _CLASSES.items()}

# The same by their classes, with a small encoder.
SMALL_GUIDES = {
    name: functools.partial(guide, encoder=(4,)) if _has_encoder(guide) else guide for name, guide in _CLASSES.items()
}
