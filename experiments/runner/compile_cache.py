"""The folder of compiled steps: where it is, and how large it may become."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["keep_compiled"]

_MOST = 4 << 30  # bytes


def keep_compiled(*, most: int = _MOST) -> None:
    """Keep compiled steps in the user's cache, where the next cell or process of the same shapes finds them.

    torch's own folder for them is a temporary one, which is left where nothing can be written to the user's.
    `TORCHINDUCTOR_CACHE_DIR` names another, which is the user's matter.

    Args:
        most: bytes that the folder may have. torch removes nothing from it: where it has more, the oldest files go until
            it has half as many, and what was compiled in them is compiled again when it is needed.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_avi"
    with suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(kept)
        _bound(kept, most)


def _bound(folder: Path, most: int) -> None:
    """Remove the oldest files of a folder of more than `most` bytes, until it has half as many."""
    found = []
    for path in folder.rglob("*"):
        # Other processes remove files meanwhile. A lock is empty and may be held.
        with suppress(OSError):
            status = path.lstat()
            if path.is_file() and status.st_size:
                found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    if total <= most:
        return
    for _, size, path in sorted(found):
        if total <= most // 2:
            return
        with suppress(OSError):
            path.unlink()
            total -= size
            # What is compiled in its place may differ in a byte.
            path.with_name(f"{path.name}.sha256").unlink(missing_ok=True)
