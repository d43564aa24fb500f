"""Files as the experiments read and write them: regular ones of a bounded size, and whole or not at all."""

import itertools
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

__all__ = ["LEFTOVERS", "UnfitFileError", "move_into", "read_regular", "write_whole"]

LEFTOVERS = "*.tmp"
"""What the files of killed writers are called; their names begin with that of the file, up to its first dot."""

_KINDS = {
    stat.S_ISDIR: "a directory",
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISCHR: "a character device",
    stat.S_ISBLK: "a block device",
    stat.S_ISSOCK: "a socket",
}


class UnfitFileError(ValueError):
    """A file that is not to be read: no regular one, or larger than it can be. The message says which, without a path."""


def read_regular(path: Path, *, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Nothing else is opened, and no more memory taken.

    Raises:
        UnfitFileError: it is a FIFO, a device or another thing that reading would wait for, or it is larger.
        OSError: it is missing or cannot be read.
    """
    # Before it is opened, which can already do something to a device.
    _check(os.stat(path), most)
    # What has taken its place since must not be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        _check(os.fstat(descriptor), most)
        content = file.read(most + 1)
    if len(content) > most:
        raise UnfitFileError(f"it grew beyond {most:,} bytes while it was read")
    return content


def _check(status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _KINDS.items() if is_kind(status.st_mode)), "something else")
        raise UnfitFileError(f"it is {kind}, not a regular file")
    if status.st_size > most:
        raise UnfitFileError(f"it has {status.st_size:,} bytes, more than the {most:,} that it can have")


def write_whole(path: Path, content: bytes) -> None:
    """Write the file under another name, see it on the disk, and rename it: it is there whole or not at all.

    Raises:
        OSError: the disk does not take it. What was there before is untouched.
    """
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # On a disk that fails the write's own error is the one to show; what stays behind is one of LEFTOVERS.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def move_into(path: Path, folder: Path) -> Path:
    """Move a file into a folder, by a name that is free there; return where it is.

    Args:
        path: the file.
        folder: made where it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = (f"{path.name}.{number}" if number else path.name for number in itertools.count())
    target = next(folder / name for name in names if not (folder / name).exists())
    path.rename(target)
    return target
