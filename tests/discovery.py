"""What the files of a package define: tests of a kind of thing take a new one because its file is there."""

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

__all__ = ["classes_in", "names_in"]


def names_in(package: ModuleType) -> dict[str, Any]:
    """What the modules of a package define and name in their ``__all__``, by name."""
    found = {}
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{file.name}")
        public = {name: getattr(module, name) for name in getattr(module, "__all__", ())}
        found |= {
            name: value for name, value in public.items() if getattr(value, "__module__", None) == module.__name__
        }
    return found


def classes_in(package: ModuleType, base: type) -> dict[str, type]:
    """The classes below ``base`` in a package, which are final there, by name."""
    found = names_in(package).items()
    return {
        name: value for name, value in found if inspect.isclass(value) and issubclass(value, base) and value is not base
    }
