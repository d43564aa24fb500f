"""ArviZ, imported where it is needed."""

import warnings
from types import ModuleType

__all__ = ["import_arviz"]


def import_arviz() -> ModuleType:
    """ArviZ, imported without the warning of its versions 0.23 that 1.0 will be different.

    This library works with both. ArviZ shows the warning once a day; where warnings are errors, the first import of a day
    would fail.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    return arviz
