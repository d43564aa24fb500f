"""Other people's models as plain Pyro programs, with the three guides put on each of them.

A module here whose name does not start with an underscore is a model. It has ``data``, ``model`` (a function or a class),
``guides`` and ``run(*, num_rows, num_steps) -> Table``; nothing is registered anywhere else. ``python -m gallery.NAME``
trains the guides and prints one table.
"""

import pkgutil

from gallery._table import Row, Table, compare, correlation, reach

__all__ = ["Row", "Table", "compare", "correlation", "names", "reach"]


def names() -> tuple[str, ...]:
    """The models there are, in alphabetical order."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return tuple(sorted(name for name in found if not name.startswith("_")))
