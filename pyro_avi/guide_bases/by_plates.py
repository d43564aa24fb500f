"""Options of a guide with one value for all sets of rows, or one for each by the names of its plates."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["by_plates", "option_for"]


def by_plates(given: Any) -> Any:
    """A dictionary by the names of plates with tuples as keys; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    return {(key,) if isinstance(key, str) else tuple(key): value for key, value in given.items()}


def option_for(given: Any, plates: tuple[str, ...], option: str, count: int) -> Any:
    """The value of an option for one set of rows, ``None`` where a dictionary leaves it out.

    Args:
        given: as :func:`by_plates` returns it.
        plates: of the rows.
        option: its name.
        count: the number of sets of rows.

    Raises:
        ValueError: if one module or function is given for several sets.
    """
    if isinstance(given, dict):
        return given.get(plates)
    if count > 1 and (isinstance(given, nn.Module) or callable(given)):
        raise ValueError(
            f"Expected {option}= for each of the {count} sets of rows, got one.\n"
            f"Pass a dictionary by the names of the plates: {option}={{{plates if len(plates) > 1 else plates[0]!r}: ...}}."
        )
    return given
