"""Rows of numbers in a file, mapped into memory: the system reads the pages asked for and writes back those that changed."""

import contextlib
import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyro_avi.tensor_files import reserve

__all__ = ["MappedFile", "is_large"]

# The share of the machine's memory above which a file is not expected to stay there.
_SHARE = 0.1


class MappedFile:
    """Numbers ``[N, W]`` in a file that belongs to this object alone for as long as its tensors are in use.

    The disk space of all rows is reserved when the file is made, without writing them: a disk that is full says so then and
    not in the middle of a training, where the system could only end the process. Rows that were never written are zeros.

    Args:
        path: the file.
        size: ``N``.
        width: ``W``.
        dtype: of the numbers.
        create: whether to make the file, or to open the one that is there.

    Attributes:
        rows: ``[N, W]``, the memory of the file.
        head: whole numbers that stand before the rows, zeros at first.

    Raises:
        ValueError: if the file has another length, cannot be written or is in use, or the disk lacks the space.
    """

    # One page, so that rows begin at the start of one.
    _HEAD = mmap.PAGESIZE

    rows: Tensor
    head: Tensor

    def __init__(self, path: Path, size: int, width: int, dtype: torch.dtype, *, create: bool):
        if os.name != "posix":
            raise ValueError(f"Expected a POSIX system for tables on disk, got {os.name!r}.\nUse rows_on='cpu'.")
        self.path, self._width, self._dtype = path, width, dtype
        self._row_bytes = width * dtype.itemsize
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        # Its memory, and with it the lock, lasts as long as the tensors.
        weakref.finalize(self, os.close, self._file)
        self._lock()
        if create:
            os.ftruncate(self._file, 0)
            self._reserve(size)
        found = os.fstat(self._file).st_size
        if found != self._length(size):
            raise ValueError(
                f"Expected {self._length(size):,} bytes for {size:,} rows in {path}, got {found:,}: the file was cut or "
                "belongs to another table.\nRestore both files of the table from a copy, or delete them to begin anew."
            )
        self._map(size)

    def _length(self, size: int) -> int:
        return self._HEAD + size * self._row_bytes

    def _lock(self) -> None:
        import fcntl  # only where there is such a thing

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Expected a table of no other guide, got {self.path}, which a guide of this or another process uses.\n"
                "Try one of the following fixes:\n"
                "- give every guide a folder of its own: rows_path=...\n"
                "- end what uses it; in one program, delete the other guide and what refers to it"
            ) from error

    def _reserve(self, size: int) -> None:
        before = os.fstat(self._file).st_size
        try:
            with _explained(self.path, self._length(size) - before):
                reserve(self._file, before, self._length(size))
        except ValueError:
            # What could be reserved goes back to the disk.
            os.ftruncate(self._file, before)
            raise

    def _map(self, size: int) -> None:
        self._memory = mmap.mmap(self._file, self._length(size))
        # Rows of a batch lie anywhere: of what is read around them nothing would be used.
        self._memory.madvise(mmap.MADV_RANDOM)
        # A smaller file soon is in memory, and asking for its pages takes longer than a step with few rows.
        self._asks = is_large(len(self._memory))
        self.head = torch.frombuffer(self._memory, dtype=torch.int64, count=self._HEAD // 8)
        numbers = torch.frombuffer(self._memory, dtype=self._dtype, count=size * self._width, offset=self._HEAD)
        self.rows = numbers.view(size, self._width)

    def resize(self, size: int) -> None:
        """Make room for more rows, which are zeros, or give up the last ones; tensors of before show the rows that stay.

        Args:
            size: their number from now on.

        Raises:
            ValueError: if the disk lacks the space; then nothing has changed.
        """
        if size < len(self.rows):
            os.ftruncate(self._file, self._length(size))
        else:
            self._reserve(size)
        self._map(size)

    def will_need(self, index: Tensor) -> None:
        """Have the system begin to read the pages of some rows, all at once, while the program goes on.

        Otherwise it would read one after the other, each as the program comes to it.

        Args:
            index: ``[B]`` the rows.
        """
        if not self._asks:
            return
        first = self._HEAD + index * self._row_bytes
        pages = torch.cat([first, first + self._row_bytes - 1]).div(mmap.PAGESIZE, rounding_mode="floor").unique()
        for page in pages.tolist():
            self._memory.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)

    def flush(self) -> None:
        """Write back all that changed; return when the disk has it."""
        with _explained(self.path):
            self._memory.flush()


def is_large(length: int) -> bool:
    """Whether a file of so many bytes is not expected to stay in the memory of the machine."""
    return length > _SHARE * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


@contextlib.contextmanager
def _explained(path: Path, needed: int = 0) -> Iterator[None]:
    """A context in which an error of the system says what was wanted of which file."""
    try:
        yield
    except OSError as error:
        what = f"{needed / 1e9:,.3g} GB free for" if needed else "to write"
        raise ValueError(
            f"Expected {what} the rows of a table at {path}, got: {error.strerror}.\n"
            "Pass rows_path= a folder that can be written, on a disk with the space for N (3 P + 2) numbers."
        ) from error
