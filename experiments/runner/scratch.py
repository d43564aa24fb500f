"""What a cell keeps of its work until its record is written, so that one that is killed goes on in the middle."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.files import UnfitFileError, read_regular, write_whole
from experiments.runner.cell import JSON
from experiments.runner.record import MOST_BYTES

__all__ = ["SCRATCH", "Scratch"]

SCRATCH = "scratch"
"""The folder of a sweep that has those of its cells."""

_JOURNAL, _LOCK = "journal", "lock"


class Scratch:
    """A folder of one cell, which is made when the cell first asks for it and removed when its record is written.

    What was kept by other code or other versions is removed then: a record is of one. Where another process has the folder,
    or the store is not there (on a machine of a cluster without the shared disk), nothing is kept and the cell runs as well.

    Args:
        folder: of the cell; None for a cell that nothing is kept of.
        made_by: code and versions.
    """

    def __init__(self, folder: Path | None = None, made_by: JSON = None) -> None:
        self._folder = folder
        self._made_by = made_by
        self._lock: FileLock | None = None
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._before: dict[str, JSON] = {"started": now, "seconds": 0.0, "resumed": 0, "compiled": [], "fallbacks": []}

    def checkpoint(self, name: str) -> Path | None:
        """The file of a training of the cell, for `checkpoint=` of `pyro_avi.fit`; None where nothing is kept."""
        return self._path(f"{name}.safetensors")

    def once(self, name: str, compute: Callable[[], JSON]) -> JSON:
        """The result of a part of the cell, as JSON: computed, or as it was kept when it was. Its checkpoint is removed.

        Args:
            name: of the part; of a training in it as well, if it has one.
            compute: gives the result.
        """
        path = self._path(f"{name}.json")
        if path is None:
            return json.loads(json.dumps(compute(), allow_nan=False))
        kept = _read(path)
        if kept is None:
            # In a list: the result itself may be None.
            kept = json.loads(json.dumps([compute()], allow_nan=False))
            _write(path, kept)
        path.with_suffix(".safetensors").unlink(missing_ok=True)
        return kept[0]

    @property
    def before(self) -> dict[str, JSON]:
        """Of the runs before this one: when the first started, the seconds of all, how many, and what they evaluated."""
        return dict(self._before)

    def note(self, seconds: float, compiled: Iterable[str], fallbacks: Iterable[str]) -> None:
        """Keep what this run has cost so far and what it has evaluated, for the one that may go on from it."""
        if self._lock is None or self._folder is None:
            return
        sums = {
            "seconds": self._before["seconds"] + seconds,
            "resumed": self._before["resumed"] + 1,
            "compiled": sorted({*self._before["compiled"], *compiled}),
            "fallbacks": sorted({*self._before["fallbacks"], *fallbacks}),
        }
        _write(self._folder / _JOURNAL, {"made_by": self._made_by, "before": self._before | sums})

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _path(self, name: str) -> Path | None:
        if self._lock is None and self._folder is not None:
            self._open(self._folder)
        return None if self._folder is None else self._folder / name

    def _open(self, folder: Path) -> None:
        # The folder of the sweep is there where the store is.
        if not folder.parents[1].is_dir():
            self._folder = None
            return
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            self._folder = None
            return
        self._lock = lock
        journal = _read(folder / _JOURNAL)
        if journal is not None and journal["made_by"] == self._made_by:
            self._before = journal["before"]
        else:
            for path in folder.iterdir():
                if path.name != _LOCK:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.note(0.0, [], [])


def _write(path: Path, value: JSON) -> None:
    content = json.dumps(value, allow_nan=False).encode("ascii")
    write_whole(path, hashlib.sha256(content).hexdigest().encode("ascii") + b"\n" + content)


def _read(path: Path) -> JSON:
    """The value in a file, None where there is none or not as it was written."""
    try:
        checksum, _, content = read_regular(path, most=MOST_BYTES).partition(b"\n")
    except (FileNotFoundError, UnfitFileError):
        return None
    return json.loads(content) if hashlib.sha256(content).hexdigest().encode("ascii") == checksum else None
