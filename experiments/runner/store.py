"""The store: one JSON file a finished cell, written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from experiments.files import LEFTOVERS, UnfitFileError, move_into, read_regular, write_whole
from experiments.runner.cell import Cell
from experiments.runner.record import (
    FORMAT,
    MOST_BYTES,
    DamagedError,
    NewerFormatError,
    Record,
    check_place,
    decode,
    encode,
)
from experiments.runner.scratch import SCRATCH

__all__ = ["Contents", "DamagedRecordError", "Store", "StoreError"]

_RESUMES = "The finished cells are kept: make the folder writable or free some space, and the same command resumes."


class StoreError(Exception):
    """A record or the folder of the records cannot be used. The message names the path and says what to do."""


class DamagedRecordError(StoreError):
    """The file of a cell holds no record of it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"The record {path} is damaged: {reason}. Move it away or delete it: its cell is run again, all others are kept."
        )
        self.path = path
        self.reason = reason


@dataclass
class Contents:
    """What the folder of a sweep holds.

    Args:
        records: by key, in the order of the keys.
        damaged: the files that hold no record of a cell of this sweep, and why.
        earlier: the keys of the records that an earlier version wrote, without a checksum.
    """

    records: dict[str, Record] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)
    earlier: list[str] = field(default_factory=list)


class Store:
    """Finished cells as files `OUT/SWEEP/cells/KEY.json`, the reasons of failed ones as `OUT/SWEEP/failures/KEY.json`.

    Several processes may work on one store. A process claims a cell before it runs it; the claim is a file lock in
    `OUT/SWEEP/claims`, so it ends with its process, however that ends. The empty files there may be deleted when no
    sweep runs.

    Args:
        out: folder of all sweeps. `prepare`, `claim` and what writes make it; reading makes nothing.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        # A lock that this process holds may be taken again, but only through the same object. Others go: each has 3 kB.
        self._locks: WeakValueDictionary[Path, FileLock] = WeakValueDictionary()

    def folder(self, sweep: str) -> Path:
        """The folder of the sweep's records."""
        return self.out / sweep / "cells"

    def path(self, cell: Cell) -> Path:
        """The file of the cell's record."""
        return self.folder(cell.sweep) / f"{cell.key}.json"

    def aside(self, sweep: str) -> Path:
        """The folder of what was found among the records and is none."""
        return self.out / sweep / "aside"

    def failure_path(self, cell: Cell) -> Path:
        """The file that says why the cell failed."""
        return self._failures(cell.sweep) / f"{cell.key}.json"

    def scratch(self, sweep: str) -> Path:
        """The folder of what unfinished cells keep, each in a folder named by its key."""
        return self.out / sweep / SCRATCH

    def prepare(self, sweep: str) -> None:
        """Make the sweep's folder, try to write there, and remove what killed writers left behind.

        Raises:
            StoreError: nothing can be written there: read-only, full, or below a file.
        """
        folder = self.folder(sweep)
        advice = "Nothing was run. Make the folder writable or free some space, or name another folder with --out."
        with _explained(f"Cannot write records below {folder}", advice):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as probe:
                # Many blocks: on a full disk an empty file can still be made.
                probe.write(bytes(1 << 16))
                probe.flush()
                os.fsync(probe.fileno())
        self.remove(sweep, self.leftovers(sweep))

    def leftovers(self, sweep: str) -> list[Path]:
        """The half files of writers, killed ones and those that write at this moment."""
        folders = self.folder(sweep), self._failures(sweep)
        return sorted(path for folder in folders for path in folder.glob(LEFTOVERS))

    def remove(self, sweep: str, paths: Iterable[Path]) -> list[Path]:
        """Remove these files and folders of cells; returns those that were. Those of cells that another process is at stay.

        Raises:
            StoreError: a file cannot be removed.
        """
        removed = []
        for path in paths:
            with self._claim(sweep, path.name.split(".")[0]) as mine:
                if mine:
                    with _explained(f"Cannot remove {path}", _RESUMES):
                        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                    removed.append(path)
        return removed

    def read(self, sweep: str) -> Contents:
        """All that the folder of the sweep's records holds. Nothing is changed.

        Raises:
            StoreError: a file cannot be read, or a later version of this code wrote it.
        """
        return self._contents(self.folder(sweep))

    def _contents(self, folder: Path) -> Contents:
        contents = Contents()
        for path in sorted(folder.glob("*.json")):
            try:
                contents.records[path.stem], written = _read(path)
            except DamagedRecordError as error:
                contents.damaged[path] = error.reason
            except StoreError:
                # Another process may have removed it since the folder was listed.
                if path.exists():
                    raise
            else:
                contents.earlier += [path.stem] if written < FORMAT else []
        return contents

    def load(self, cell: Cell) -> Record | None:
        """The record of the cell, None when it is not finished.

        Raises:
            DamagedRecordError: the file holds no record of the cell.
            StoreError: it cannot be read, or a later version of this code wrote it.
        """
        path = self.path(cell)
        return _read(path)[0] if path.exists() else None

    def set_aside(self, sweep: str, damaged: Iterable[Path]) -> dict[Path, Path]:
        """Move these files, where they are still damaged, out of the way: where each lies now.

        A file whose cell another process is at stays: that process replaces it.

        Raises:
            StoreError: a file cannot be moved.
        """
        moved = {}
        for path in damaged:
            with self._claim(sweep, path.stem) as mine:
                if not mine:
                    continue
                try:
                    # Another process may have run the cell since.
                    _read(path)
                except DamagedRecordError:
                    with _explained(f"Cannot set {path} aside", _RESUMES):
                        moved[path] = move_into(path, self.aside(sweep))
        return moved

    def save(self, record: Record) -> Path:
        """Write the record, whole or not at all, and return its path. What the cell has kept is removed, its failure too.

        Waits while another process holds the claim of the same cell.

        Raises:
            StoreError: the record is malformed, or the disk does not take it.
        """
        path = self.folder(str(record.get("sweep"))) / f"{record.get('key')}.json"
        self._write(record, path)
        sweep, key = record["sweep"], record["key"]
        self.remove(sweep, [self._failures(sweep) / path.name, self.scratch(sweep) / key])
        return path

    def save_failure(self, cell: Cell, reason: str) -> None:
        """Mark the cell as failed, until it is finished; raises as `save`. It is run again all the same."""
        named = {"format": FORMAT, "sweep": cell.sweep, "key": cell.key, "settings": cell.settings}
        ended = {"ended": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        # The end of an error says what it is.
        mark = {**named, "failure": reason[-10_000:], "provenance": ended}
        self._write(mark, self.failure_path(cell))

    def failures(self, sweep: str) -> dict[str, Record]:
        """The marks of failed cells by key, each with its `failure`; raises as `read`. Damaged ones are left out."""
        return self._contents(self._failures(sweep)).records

    def is_claimed(self, cell: Cell) -> bool:
        """Whether another process, or another store of this one, is at the cell. Makes no file.

        Raises:
            StoreError: the lock file cannot be opened.
        """
        if not (self._claims(cell.sweep) / f"{cell.key}.lock").exists():
            return False
        with self.claim(cell) as mine:
            return not mine

    @contextmanager
    def claim(self, cell: Cell) -> Iterator[bool]:
        """Claim the cell: True within the block, False where another living process holds the claim.

        Raises:
            StoreError: the lock file cannot be made.
        """
        with self._claim(cell.sweep, cell.key) as mine:
            yield mine

    @contextmanager
    def _claim(self, sweep: str, key: str) -> Iterator[bool]:
        with _explained(f"Cannot claim cell {key} below {self.out / sweep}", _RESUMES):
            lock = self._lock(sweep, key)
            try:
                lock.acquire(blocking=False)
                mine = True
            except Timeout:
                mine = False
        try:
            yield mine
        finally:
            if mine:
                lock.release()

    def _lock(self, sweep: str, key: str) -> FileLock:
        path = self._claims(sweep) / f"{key}.lock"
        lock = self._locks.get(path)
        if lock is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._locks[path] = FileLock(path)
        return lock

    def _claims(self, sweep: str) -> Path:
        return self.out / sweep / "claims"

    def _failures(self, sweep: str) -> Path:
        return self.out / sweep / "failures"

    def _write(self, record: Record, path: Path) -> None:
        try:
            content = encode(record)
            check_place(record, path)
        except DamagedError as error:
            raise StoreError(f"Cannot write the record {path}: {error}.") from error
        with _explained(f"Cannot write the record {path}", _RESUMES), self._lock(record["sweep"], record["key"]):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Turn the system's errors into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}. {advice}") from error


def _read(path: Path) -> tuple[Record, int]:
    try:
        with _explained(f"Cannot read the record {path}", "Make it readable."):
            content = read_regular(path, most=MOST_BYTES)
        record, written = decode(content)
        check_place(record, path)
    except (UnfitFileError, DamagedError) as error:
        raise DamagedRecordError(path, str(error)) from error
    except NewerFormatError as error:
        advice = "Nothing was changed. Update the checkout, or name another folder with --out."
        raise StoreError(f"Cannot read the record {path}: {error}. {advice}") from error
    return record, written
