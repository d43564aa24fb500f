"""A folder of this machine for what the processes of one sweep would otherwise each read or make alone."""

import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["SHARED", "shared_folder", "sharing"]

SHARED = "PYRO_AVI_SHARED"
"""The environment variable that names the folder, for the processes that inherit it."""

_PREFIX = "pyro_avi_shared_"
# The open files by which this process says that it uses a folder.
_used: dict[Path, int] = {}


@contextmanager
def sharing() -> Iterator[None]:
    """Within the block this process and those it starts share a folder, on every machine that they run on.

    It lies among the temporary files, is made when it is first asked for, and is removed at the end of the block. What killed
    processes, or those on other machines, have left behind is removed when the next such folder is made there.
    """
    if SHARED in os.environ:
        yield
        return
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{uuid.uuid4().hex}"
    os.environ[SHARED] = str(folder)
    try:
        yield
    finally:
        del os.environ[SHARED]
        if folder in _used:
            os.close(_used.pop(folder))
        # Whoever still has a file of it open keeps the file.
        shutil.rmtree(folder, ignore_errors=True)


def shared_folder() -> Path | None:
    """The folder that this process shares with others, of this user alone; None where there is none or it cannot be made."""
    name = os.environ.get(SHARED)
    if not name:
        return None
    folder = Path(name)
    if folder in _used:
        return folder
    try:
        if not folder.exists():
            _remove_unused(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        if not _is_own(folder):
            return None
        _used[folder] = _opened(folder)
    except OSError:
        return None
    return folder


def _is_own(folder: Path) -> bool:
    status = folder.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _opened(folder: Path, *, alone: bool = False) -> int:
    """A file of the folder, locked until it is closed or the process ends.

    Raises:
        OSError: others have it locked, and it is to be locked alone; or the folder has gone.
    """
    # Sweeps do not run where it is missing, but this file is imported there.
    import fcntl

    file = os.open(folder / "used", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _remove_unused(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if _is_own(folder):
                file = _opened(folder, alone=True)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(file)
