"""ArviZ, imported where it is needed."""

import warnings
from types import ModuleType

__all__ = ["import_arviz"]


def import_arviz() -> ModuleType:
    """ArviZ, without what its versions 0.23 say once a day and user as they are imported: that 1.0 will be different.

    Both are written for here, and for who makes errors of warnings the import would fail on the first run of each day.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    return arviz
