"""Errors whose message is final."""

import re

__all__ = ["CallError", "without_table"]

# What Pyro aligns to the right, in a table of its own.
_TABLE = re.compile(r"\n *Trace Shapes:")


def without_table(message: str) -> str:
    """A message without the table of shapes that ``poutine.trace`` has put behind it."""
    return _TABLE.split(message, maxsplit=1)[0]


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
