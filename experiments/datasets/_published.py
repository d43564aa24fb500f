"""Files as their authors published them: checked when read, and fetched by torchvision when asked for."""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

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
            DatasetError: if it is missing, unreadable, truncated or another file, and cannot be downloaded.
        """
        try:
            return self._checked(root)
        except DatasetError:
            if not download:
                raise
        self._fetch(root)
        return self._checked(root)

    def _checked(self, root: Path) -> bytes:
        path = root / self.path
        try:
            content = path.read_bytes()
        except OSError as error:
            raise self._error(root, f"reading it gave: {error.strerror}") from error
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != self.md5:
            verdict = "truncated" if len(content) < self.size else "not the published file"
            raise self._error(root, f"got {len(content):,} bytes, md5 {md5}: {verdict}")
        return content

    def _fetch(self, root: Path) -> None:
        try:
            from torchvision.datasets import utils
        # Beside a torch that it was not built for, torchvision raises RuntimeError (or OSError, from the loader).
        except (ImportError, OSError, RuntimeError) as error:
            reason = (
                f"torchvision, which downloads it, cannot be imported ({type(error).__name__}: {error}): it is not "
                "installed, or was built for another torch. A CPU-only torch needs a CPU-only torchvision"
            )
            raise self._error(root, reason) from error
        target = root / self.path
        failures = []
        for url in self.urls:
            try:
                if self.archive_md5 is None:
                    utils.download_url(url, str(target.parent), target.name, self.md5)
                else:
                    utils.download_and_extract_archive(url, str(root), md5=self.archive_md5)
            except (OSError, RuntimeError, HTTPException) as error:
                failures.append(f"{url} gave {type(error).__name__}: {error}")
            else:
                return
        raise self._error(root, f"the download failed: {'; '.join(failures)}")

    def _error(self, root: Path, reason: str) -> DatasetError:
        path = root / self.path
        sources = " or ".join(self.urls)
        if self.archive_md5 is None:
            by_hand = f"get {sources} and place it at {path}"
        else:
            by_hand = f"get {sources} (md5 {self.archive_md5}) and unpack it in {root}"
        return DatasetError(
            f"{path}: expected the published file of {self.size:,} bytes, md5 {self.md5}; {reason.rstrip('.')}.\n"
            "Try one of the following fixes:\n"
            '- python -m pip install ".[vision]", then run again with --download\n'
            f"- {by_hand},\n"
            f"  or point --data-dir or the environment variable PYRO_AVI_DATA to a folder that holds {self.path}"
        )
