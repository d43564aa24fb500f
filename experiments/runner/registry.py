"""The sweeps there are, found by their paths: see `experiments.sweeps`."""

import importlib
import pkgutil
from types import ModuleType

__all__ = ["find", "names"]

# Sweeps stand on the runner, which therefore knows the package by its name alone.
_SWEEPS = "experiments.sweeps"


def names() -> list[str]:
    """The names of all sweeps, sorted. Modules whose name begins with an underscore are helpers."""
    found = {module.name for module in pkgutil.iter_modules(importlib.import_module(_SWEEPS).__path__)}
    return sorted(name for name in found if not name.startswith("_"))


def find(name: str) -> ModuleType:
    """The module of the sweep `name`.

    Raises:
        ValueError: there is no sweep of that name.
    """
    known = names()
    if name not in known:
        raise ValueError(f'Unknown sweep "{name}". Expected one of: {", ".join(known)}.')
    return importlib.import_module(f"{_SWEEPS}.{name}")
