"""Downloads by torchvision: with a time limit, tried again, apart until they are whole, and never over a file that is there."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

from filelock import FileLock

TIMEOUT = 30.0  # seconds that a server may say nothing
PAUSES = (1.0, 5.0)  # seconds before all sources are tried again


class DownloadError(Exception):
    """What was tried to get a file, and why it failed. Its cause is the error of torchvision's import, if that failed."""


def download_missing(root: Path, path: str, urls: Sequence[str], *, md5: str, archive: bool) -> None:
    """Get the file ``path`` of the data folder ``root``; from an archive also its other files that are missing.

    Processes that want files of one folder get them one after another, each file once.

    Args:
        root: the data folder, made where it is missing.
        path: the file, below ``root``.
        urls: where it can be had, or an archive of it.
        md5: the checksum of what the sources deliver.
        archive: whether they deliver an archive that unpacks to ``path`` in the data folder.

    Raises:
        DownloadError: torchvision cannot be imported, no source delivers, or the folder cannot be written to.
    """
    utils = _torchvision()
    # Beside the places of the files: renaming does not work from disk to disk.
    work = root / ".downloads"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock"):
            if (root / path).exists():
                return
            # Where a process was killed, its half files are still there.
            files = work / "files"
            shutil.rmtree(files, ignore_errors=True)
            try:
                _deliver(partial(_fetch, utils, files, path, md5=md5, archive=archive), urls)
                for file in sorted(file for file in files.rglob("*") if file.is_file()):
                    _place(file, root / file.relative_to(files))
            finally:
                shutil.rmtree(files, ignore_errors=True)
    except OSError as error:
        raise DownloadError(f"the download failed: {error.strerror or error}") from error


def _torchvision() -> ModuleType:
    try:
        from torchvision.datasets import utils
    # Beside a torch that it was not built for, torchvision raises RuntimeError (or OSError, from the loader).
    except (ImportError, OSError, RuntimeError) as error:
        raise DownloadError(
            f"torchvision, which downloads it, cannot be imported ({type(error).__name__}: {error}): it is not "
            "installed, or was built for another torch. A CPU-only torch needs a CPU-only torchvision"
        ) from error
    return utils


def _deliver(fetch: Callable[[str], None], urls: Sequence[str]) -> None:
    """Fetch from one of the sources, each tried again after a pause."""
    failures: dict[str, str] = {}
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        for url in urls:
            try:
                fetch(url)
            except (OSError, RuntimeError, HTTPException) as error:
                failures[url] = f"{url} gave {type(error).__name__}: {error}"
            else:
                return
    tries = f"the download failed, {1 + len(PAUSES)} times"
    raise DownloadError(f"{tries}: {'; '.join(failures.values())}")


def _fetch(utils: ModuleType, files: Path, path: str, url: str, *, md5: str, archive: bool) -> None:
    """Put what the source delivers into ``files``, as it is laid out in the data folder."""
    with _time_limit():
        if not archive:
            utils.download_url(url, str((files / path).parent), Path(path).name, md5)
            return
        packed = files.parent / url.rpartition("/")[2]
        utils.download_url(url, str(packed.parent), packed.name, md5)
        utils.extract_archive(str(packed), str(files))
        packed.unlink()


@contextmanager
def _time_limit() -> Iterator[None]:
    """torchvision sets no time limit, so its connections take the default of the process: one cell at a time is in it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _place(file: Path, target: Path) -> None:
    """Give a whole file its name, unless something has it already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except FileExistsError:
        return
    except OSError:
        # A file system without hard links.
        if not os.path.lexists(target):
            file.rename(target)
