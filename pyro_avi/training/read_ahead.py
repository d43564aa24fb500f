"""The rows of the next batch read from a file while a step is taken."""

import mmap
import os
import weakref
from typing import Any

import numpy as np
from torch import Tensor

from pyro_avi.rows.mapped_file import is_large

__all__ = ["ReadAhead"]


class ReadAhead:
    """Has the system begin to read rows of arrays that are mapped from files; of other arrays, and of small files, nothing.

    Args:
        arrays: any objects.
    """

    def __init__(self, arrays: tuple[Any, ...]):
        self._files: list[tuple[int, int, int]] = []
        for array in arrays:
            if _is_whole_file(array) and is_large(array.nbytes):
                file = os.open(array.filename, os.O_RDONLY)
                weakref.finalize(self, os.close, file)
                self._files.append((file, array.offset, array.nbytes // len(array)))

    def __call__(self, index: Tensor) -> None:
        """Begin to read the rows ``index [B]``."""
        for file, start, length in self._files:
            for row in index.tolist():
                os.posix_fadvise(file, start + row * length, length, os.POSIX_FADV_WILLNEED)


def _is_whole_file(array: Any) -> bool:
    """Whether an array is mapped and not a part of one that is: of a part, where in the file it lies is not known."""
    mapped = isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.filename is not None
    return mapped and array.flags.c_contiguous and hasattr(os, "posix_fadvise")
