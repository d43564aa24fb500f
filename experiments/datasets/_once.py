"""Data sets read once on a machine: the first process that needs one keeps its pixels, and the others map them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from filelock import FileLock

from experiments.shared_folder import shared_folder

from ._images import Pixels


def read_once(read: Callable[[], Pixels], *where: str) -> Pixels:
    """What ``read()`` gives, which one of the processes that share a folder calls; where they share none, each does.

    Args:
        read: reads and checks the files of a data set.
        where: what tells data sets apart: name and folder.
    """
    folder = shared_folder()
    if folder is None:
        return read()
    key = hashlib.sha256("\0".join(where).encode()).hexdigest()[:16]
    lock = FileLock(folder / f"{key}.lock")
    try:
        lock.acquire()
    except OSError:
        return read()
    try:
        kept = _mapped(folder, key)
        if kept is None:
            pixels = read()
            # A full disk is no reason to stop.
            with suppress(OSError):
                _keep(pixels, folder, key)
            kept = _mapped(folder, key) or pixels
        return kept
    finally:
        lock.release()


def _paths(folder: Path, key: str) -> list[Path]:
    return [folder / f"{key}.{field}.npy" for field in Pixels._fields]


def _keep(pixels: Pixels, folder: Path, key: str) -> None:
    # The last of them makes them whole: nobody maps what is there without it.
    for path, value in zip(_paths(folder, key), pixels, strict=True):
        np.save(path, value)


def _mapped(folder: Path, key: str) -> Pixels | None:
    *_, last = paths = _paths(folder, key)
    if not last.exists():
        return None
    with suppress(OSError, ValueError, EOFError):
        train, test, maximum = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
        return Pixels(train, test, int(maximum))
    return None
