"""Answers kept by the digest of the question, the latest within a bound of memory."""

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

__all__ = ["Kept"]

Answer = TypeVar("Answer")


class Kept(Generic[Answer]):
    """The latest answers, the one that was used last going last.

    Args:
        max_bytes: of all answers together.

    Example::

        >>> from pyro_avi.densities.kept import Kept
        >>> kept = Kept(max_bytes=100)
        >>> kept.keep(b"one", "first", 60), kept.keep(b"two", "second", 60)
        (None, None)
        >>> kept.look_up(b"one"), kept.look_up(b"two"), kept.look_up(b"two")
        ((None, 0), ('second', 1), ('second', 2))
    """

    def __init__(self, max_bytes: int = 2**27):
        self._max_bytes = max_bytes
        self._answers: OrderedDict[bytes, tuple[Answer, int, int]] = OrderedDict()
        self._lock = threading.Lock()

    def look_up(self, digest: bytes | None) -> tuple[Answer | None, int]:
        """The answer, or ``None``, and how often it has been looked up with this time."""
        with self._lock:
            if digest is None or digest not in self._answers:
                return None, 0
            answer, num_bytes, uses = self._answers.pop(digest)
            self._answers[digest] = answer, num_bytes, uses + 1
            return answer, uses + 1

    def keep(self, digest: bytes | None, answer: Answer, num_bytes: int) -> None:
        """Keep an answer, in place of one of the same digest; none without a digest, or one above the bound alone."""
        if digest is None or num_bytes > self._max_bytes:
            return
        with self._lock:
            self._answers.pop(digest, None)
            self._answers[digest] = answer, num_bytes, 0
            while sum(size for _, size, _ in self._answers.values()) > self._max_bytes:
                self._answers.popitem(last=False)
