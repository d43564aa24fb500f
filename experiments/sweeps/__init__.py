"""One experiment a file: the module path is the registry.

A sweep is a module of this package, or a file in a folder that the environment variable `PYRO_AVI_SWEEPS` names
(several folders are separated as in `PATH`), so that an experiment of one's own needs no change of the checkout.
It offers

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

__all__ = ["find", "names"]

__path__ = [*__path__, *filter(None, os.environ.get("PYRO_AVI_SWEEPS", "").split(os.pathsep))]


def names() -> list[str]:
    """The names of all sweeps, sorted. Modules whose name begins with an underscore are helpers."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")})


def find(name: str) -> ModuleType:
    """The module of the sweep `name`.

    Raises:
        ValueError: there is no sweep of that name.
    """
    known = names()
    if name not in known:
        raise ValueError(f'Unknown sweep "{name}". Expected one of: {", ".join(known)}.')
    return importlib.import_module(f"{__name__}.{name}")
