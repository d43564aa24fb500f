"""Files as their authors published them: checked when read, and fetched by torchvision when asked for."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from experiments.files import UnfitFileError, read_regular

from ._download import DownloadError, download_missing
from ._images import DatasetError


@dataclass(frozen=True)
class PublishedFile:
    """One file of a published data set.

    Args:
        path: where it lies in the data folder.
        size: its length in bytes, for the error message.
        md5: its published checksum, in hexadecimal.
        urls: where it can be had, or, given ``archive_md5``, where an archive can be had that unpacks to it.
        archive_md5: the published checksum of that archive.
    """

    path: str
    size: int
    md5: str
    urls: tuple[str, ...]
    archive_md5: str | None = None

    def read(self, root: Path, *, download: bool) -> bytes:
        """The content of the file in the data folder ``root``, known to be the published one.

        Raises:
            DatasetError: if it is unreadable, truncated or another file, or is missing and cannot be downloaded.
        """
        # What lies there and is not the published file may be all that somebody has of it: it is not replaced.
        if download and not os.path.lexists(root / self.path):
            try:
                md5 = self.archive_md5 or self.md5
                download_missing(root, self.path, self.urls, md5=md5, archive=self.archive_md5 is not None)
            except DownloadError as error:
                raise self._error(root, str(error)) from error.__cause__
        return self._checked(root)

    def _checked(self, root: Path) -> bytes:
        path = root / self.path
        try:
            content = read_regular(path, most=self.size)
        except UnfitFileError as error:
            raise self._error(root, f"{error}: not the published file") from error
        except OSError as error:
            raise self._error(root, f"reading it gave: {error.strerror}") from error
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != self.md5:
            verdict = "truncated" if len(content) < self.size else "not the published file"
            raise self._error(root, f"got {len(content):,} bytes, md5 {md5}: {verdict}")
        return content

    def _error(self, root: Path, reason: str) -> DatasetError:
        path = root / self.path
        sources = " or ".join(self.urls)
        in_the_way = "- move away what lies there; nothing is replaced\n" if os.path.lexists(path) else ""
        if self.archive_md5 is None:
            by_hand = f"get {sources} and place it at {path}"
        else:
            by_hand = f"get {sources} (md5 {self.archive_md5}) and unpack it in {root}"
        return DatasetError(
            f"{path}: expected the published file of {self.size:,} bytes, md5 {self.md5}; {reason.rstrip('.')}.\n"
            "Try one of the following fixes:\n"
            f"{in_the_way}"
            '- python -m pip install ".[vision]", then run again with --download\n'
            f"- {by_hand},\n"
            f"  or point --data-dir or the environment variable PYRO_AVI_DATA to a folder that holds {self.path}"
        )
