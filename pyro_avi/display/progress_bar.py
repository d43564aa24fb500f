"""The progress bar of everything that takes long."""

from contextlib import AbstractContextManager
from typing import Protocol

from tqdm.auto import tqdm

__all__ = ["ProgressBar", "progress_bar"]


class ProgressBar(Protocol):
    """What the library uses of a bar of ``tqdm``."""

    n: int
    total: int

    def update(self, n: int = 1) -> object:
        """Count ``n`` more units of work."""
        ...

    def set_postfix(self, *, refresh: bool, **shown: str) -> None:
        """Show these values behind the count."""
        ...


# Seconds before a bar appears: work that is done by then needs none.
_DELAY = 1.0


def progress_bar(
    total: int | None, *, unit: str, progress: bool, initial: int = 0
) -> AbstractContextManager[ProgressBar]:
    """A context in which a bar on standard error counts units of work; it appears after the first second.

    Args:
        total: the number of units, ``None`` where it is not known.
        unit: the name of a unit.
        progress: whether to show the bar; without it counting costs nothing.
        initial: the number of units done before.
    """
    return tqdm(total=total, initial=initial, disable=not progress, unit=unit, delay=_DELAY)
