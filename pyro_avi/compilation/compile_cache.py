"""Inductor's cache on disk when files in it are damaged: by a compilation that was killed, or by a disk.

What is in the cache follows from its name, so that a file that is removed is made again.
"""

import os
import re
import struct
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_avi.compilation.checksums import check_file, checksum_path

__all__ = [
    "check_libraries",
    "remove_damaged_libraries",
    "remove_damaged",
    "warn_of_removed",
    "warnings_of_inductor_ignored",
]

_checked: set[Path] = set()

_WORDS = "Damaged files of the compile cache were removed, and compiled again"


def check_libraries() -> list[Path]:
    """Remove damaged libraries from inductor's cache, once a process and folder; return them.

    Not left to the error of loading one: a process that loads a library without its end is killed by the system, and a
    probe that fails to load one takes the processor for a slower one.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    if folder in _checked:
        return []
    _checked.add(folder)
    return remove_damaged_libraries(folder)


def remove_damaged(error: Exception) -> list[Path]:
    """Remove what may have caused an error of inductor from its cache: damaged libraries, and the files that the error names.

    Returns:
        What was removed.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    # With the frames, which name the modules in the cache that took part, and the errors that it came from.
    text = "".join(traceback.format_exception(error))
    removed = remove_damaged_libraries(Path(cache_dir()))
    for key in sorted(set(re.findall(r"\bc[a-z2-7]{40,}", text))):
        folders = [Path(cache_dir()) / key[1:3]]
        if re.search(r"\bPCH\b|precompiled (header|file)", text):
            # Compilers do not name it; its source stands in their command line. It takes long to make.
            folders.append(Path(default_cache_dir()) / "precompiled_headers")
        for path in sorted(path for folder in folders for path in folder.glob(f"{key}.*")):
            # This process makes a header once: from now on it includes the source of a removed one.
            if path.is_file() and path.suffix != ".h":
                path.unlink(missing_ok=True)
                removed.append(path)
    return removed


def remove_damaged_libraries(folder: Path) -> list[Path]:
    """Remove libraries that are not whole, and probes that have changed, unless one is being made; return them."""
    from torch.utils._filelock import FileLock

    removed = []
    for where, _, names in os.walk(folder):
        for path in (Path(where) / name for name in names if name.endswith(".so")):
            if not _is_damaged(path):
                continue
            # Inductor's own lock of it, which is held while it is compiled.
            (folder / "locks").mkdir(exist_ok=True)
            lock = FileLock(folder / "locks" / f"{path.name.split('.')[0]}.lock")
            with suppress(TimeoutError), lock.acquire(timeout=0):
                if _is_damaged(path):
                    path.unlink()
                    checksum_path(path).unlink(missing_ok=True)
                    removed.append(path)
    return removed


def _is_damaged(library: Path) -> bool:
    if _is_cut(library):
        return True
    # The libraries of graphs are checked when they are loaded. Of the others, which inductor probes the processor with, it
    # takes an error for the answer: these few and small ones are checked here.
    if not library.name.endswith(".main.so"):
        try:
            check_file(library)
        except RuntimeError:
            return True
    return False


def _is_cut(library: Path) -> bool:
    """Whether an ELF library ends before its table of sections, which linkers write last; ``False`` on other systems."""
    if sys.platform != "linux":
        return False
    try:
        with library.open("rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if len(head) < 64 or not head.startswith(b"\x7fELF"):
        return True
    order = "<" if head[5] == 1 else ">"
    (start,), (of_each, count) = struct.unpack_from(f"{order}Q", head, 40), struct.unpack_from(f"{order}HH", head, 58)
    return size < start + of_each * count


def warn_of_removed(removed: list[Path]) -> None:
    """Say which damaged files were removed."""
    more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
    warnings.warn(f"{_WORDS}: {', '.join(map(str, removed[:3]))}{more}.", stacklevel=2)


@contextmanager
def warnings_of_inductor_ignored() -> Iterator[None]:
    """A context in which warnings are ignored, as users can mend none of inductor's, but those of damaged files."""
    caught: list[warnings.WarningMessage] | None = None
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=_WORDS)
            yield
    finally:
        for warning in caught or ():
            warnings.warn(str(warning.message), stacklevel=4)
