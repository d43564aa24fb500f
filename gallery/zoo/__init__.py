"""Models as they come: some that ship in packages, some written after Pyro's examples, with default guides and Pyro's own.

A module here whose name does not start with an underscore is a model. It has ``problem() -> Problem``; nothing is registered
anywhere else. ``python -m gallery.zoo`` trains the constant, the amortized and the factorized guide with default arguments
and the guide that comes with the model, all by the same steps, and prints one table; ``python -m gallery.zoo NAME ...`` does it
for the models named.
"""

import pkgutil
from importlib import import_module

from gallery.zoo._problem import Outcome, Problem, seeded, solve, table

__all__ = ["Outcome", "Problem", "names", "problem", "seeded", "solve", "table"]


def names() -> tuple[str, ...]:
    """The models there are, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def problem(name: str) -> Problem:
    """The problem of one name."""
    return import_module(f"gallery.zoo.{name}").problem()
