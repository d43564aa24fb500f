"""Errors whose message is final, and checks that many parts share."""

import re
from numbers import Integral
from typing import Any

__all__ = ["CallError", "check_count", "check_held", "without_table"]

# What Pyro aligns to the right, in a table of its own.
_TABLE = re.compile(r"\n *Trace Shapes:")


def without_table(message: str) -> str:
    """A message without the table of shapes that ``poutine.trace`` has put behind it."""
    return _TABLE.split(message, maxsplit=1)[0]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """The value, if it is a whole number of at least ``least``.

    Args:
        name: what it counts, for the message.
        value: any object.
        least: the smallest number.

    Raises:
        TypeError: if it is not a whole number.
        ValueError: if it is smaller.

    Example::

        >>> from pyro_avi.errors import check_count
        >>> check_count("num_samples", 3)
        3
        >>> check_count("num_samples", 0)
        Traceback (most recent call last):
        ValueError: Expected num_samples of at least 1, got 0.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"Expected {name} to be a whole number, got {value!r}.")
    if value < least:
        raise ValueError(f"Expected {name} of at least {least}, got {value}.")
    return int(value)


class CallError(ValueError):
    """What is wrong with a call of a model or guide, in a sentence of this package alone.

    ``poutine.trace`` raises an error of a traced function again, of the same class and with its table of shapes behind the
    message. That table is empty or of no use where the message says what to do, and is left out.

    Args:
        message: the sentence.
    """

    def __init__(self, message: str):
        super().__init__(without_table(message))

    @classmethod
    def of(cls, error: ValueError) -> ValueError:
        """The same as a final one, unless it has such a table already: of a model that was traced, and whose error it is."""
        if type(error) is not ValueError or _TABLE.search(str(error)):
            return error
        return cls(str(error)).with_traceback(error.__traceback__)


def check_held(what: str, asked: int, held: int) -> None:
    """Raise an error for a part that is larger than the file that describes it, before memory is taken for it.

    Args:
        what: the part, for the message.
        asked: the numbers that it has at least.
        held: the numbers that the file holds for it.

    Raises:
        ValueError: if the file holds fewer.
    """
    if asked > held:
        raise ValueError(
            f"Expected a file with the {asked:,} numbers of {what} that it describes, got one that holds {held:,} for them.\n"
            "The file is damaged, or the model has other rows than the one that the guide was made with."
        )
