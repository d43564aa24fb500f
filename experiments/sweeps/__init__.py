"""One experiment a file: the module path is the registry.

A sweep is a module of this package, or a file in a folder that the environment variable `PYRO_AVI_SWEEPS` names
(several folders are separated as in `PATH`), so that an experiment of one's own needs no change of the checkout. Its
report, if it has one, is the file of the same name in the folder `reports` of that folder (see `experiments.report`).
A sweep offers

    summary: str                                    one line for `--list`
    add_arguments(parser)                           its own options
    plan(options, records) -> list[Cell]            all cells that can be named now, given the finished records by key
    count(options) -> int                           the cells of all stages
    describe(cell) -> str                           a short label
    estimate(cell, *, device) -> float              seconds, roughly
    run(settings, context) -> dict                  the result, as JSON: None in place of a number that is not finite

`plan` is asked again whenever the cells it named are finished (cells that tune a learning rate come first, then those
that use it) and while other processes run some of them, so it is quick. A sweep is finished when `plan` names no cell
that the store lacks. `plan` and `count` raise ValueError, with a message for the user, for options that are bad or
contradict one another.
"""

import importlib
import os
import pkgutil
from types import ModuleType

__all__ = ["find", "folders", "names"]


def folders() -> list[str]:
    """The folders of sweeps of one's own."""
    return [folder for folder in os.environ.get("PYRO_AVI_SWEEPS", "").split(os.pathsep) if folder]


__path__ = [*__path__, *folders()]


def names() -> list[str]:
    """The names of all sweeps, sorted. Modules whose name begins with an underscore are helpers, and `reports` are those."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return sorted(name for name in found if not name.startswith("_") and name != "reports")


def find(name: str) -> ModuleType:
    """The module of the sweep `name`.

    Raises:
        ValueError: there is no sweep of that name.
    """
    known = names()
    if name not in known:
        raise ValueError(f'Unknown sweep "{name}". Expected one of: {", ".join(known)}.')
    return importlib.import_module(f"{__name__}.{name}")
