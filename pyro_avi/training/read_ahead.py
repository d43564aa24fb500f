"""The rows of the next batches read from files while a step is taken."""

import mmap
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_avi.rows.mapped_file import is_large

__all__ = ["RowReader"]

# Batches that are read at once, at most and at least: a disk answers many requests in the time of one. And the bytes that
# they may have together, as a batch of images takes megabytes.
_MOST, _LEAST, _BYTES = 32, 2, 2**26


class RowReader:
    """Reads the rows of batches: of large arrays on disk in threads, ahead of time; otherwise when they are needed.

    A thread reads the rows of a batch one after the other, and waits for the disk at each; it stands in the way of no other
    thread meanwhile. As many begin as the disk is slow, and all end with this object.

    Args:
        arrays: what the tensors were made of; those that are large and mapped from files are read ahead.
        tensors: ``[N, ...]`` each.
        dtypes: of the rows, one for each tensor.
        batch_size: the number of rows of most batches.

    Attributes:
        ahead: the number of batches to begin before their rows are needed.
    """

    def __init__(
        self,
        arrays: tuple[Any, ...],
        tensors: tuple[Tensor, ...],
        dtypes: tuple[torch.dtype, ...],
        batch_size: int,
    ):
        self._tensors, self._dtypes = tensors, dtypes
        files = [
            memory for array in arrays if (memory := _memory_of_file(array)) is not None and is_large(array.nbytes)
        ]
        for memory in files:
            _read_rows_alone(self, memory)
        row_bytes = sum(tensor[0].numel() * dtype.itemsize for tensor, dtype in zip(tensors, dtypes, strict=True))
        self.ahead = max(_LEAST, min(_MOST, _BYTES // (row_bytes * batch_size or 1))) if files else 0
        self._threads: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def in_memory(self) -> tuple[Tensor, ...] | None:
        """The tensors, where rows are copies of theirs in the memory of the processor; ``None`` elsewhere."""
        pairs = zip(self._tensors, self._dtypes, strict=True)
        plain = all(x.dtype == dtype and x.device.type == "cpu" and x.is_contiguous() for x, dtype in pairs)
        return self._tensors if plain and not self.ahead else None

    def begin(self, index: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to read rows.

        Args:
            index: ``[B]`` the rows.

        Returns:
            A function that waits for them and returns them, or raises what reading them has raised.
        """
        parts = list(zip(self._tensors, self._dtypes, strict=True))

        def read() -> tuple[Tensor, ...]:
            # Faster than tensor[index], the same rows.
            return tuple(tensor.index_select(0, index).to(dtype) for tensor, dtype in parts)

        if not self.ahead:
            return read
        process = os.getpid()
        # Threads do not go on in a process that was forked.
        if self._threads is None or self._process != process:
            self._threads, self._process = ThreadPoolExecutor(self.ahead, "pyro_avi rows"), process
            weakref.finalize(self, self._threads.shutdown, wait=False, cancel_futures=True)
        found = self._threads.submit(read)
        return lambda: found.result() if os.getpid() == process else read()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_threads": None}


def _memory_of_file(array: Any) -> mmap.mmap | None:
    """The memory of the file that an array or a part of one is mapped from; ``None`` where it is none."""
    mapped = isinstance(array, np.memmap)
    while isinstance(array, np.ndarray):
        array = array.base
    return array if mapped and isinstance(array, mmap.mmap) else None


def _read_rows_alone(reader: RowReader, memory: mmap.mmap) -> None:
    """Have the system read nothing around the rows for as long as there is a reader: of rows anywhere that is lost."""
    if hasattr(memory, "madvise"):  # not on Windows
        memory.madvise(mmap.MADV_RANDOM)
        weakref.finalize(reader, memory.madvise, mmap.MADV_NORMAL)
