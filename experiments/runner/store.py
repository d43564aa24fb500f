"""The store: one JSON file a finished cell, written whole or not at all."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from experiments.runner.cell import JSON, Cell

__all__ = ["FORMAT", "Record", "Store", "StoreError"]

FORMAT = 1

Record = dict[str, JSON]

_FIELDS = {"format": int, "sweep": str, "key": str, "settings": dict, "result": dict, "provenance": dict}

_RESUMES = "The finished cells are kept: make the folder writable or free some space, and the same command resumes."


class StoreError(Exception):
    """A record or the folder of the records cannot be used. The message names the path and says what to do."""


class Store:
    """Finished cells as files `OUT/SWEEP/cells/KEY.json`.

    Several processes may work on one store. A process claims a cell before it runs it; the claim is a file lock in
    `OUT/SWEEP/claims`, so it ends with its process, however that ends. The empty files there may be deleted when no
    sweep runs.

    Args:
        out: folder of all sweeps. `prepare`, `claim` and `save` make it; reading makes nothing.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(out)
        # A lock that this process holds may be taken again, but only through the same object.
        self._locks: dict[Path, FileLock] = {}

    def folder(self, sweep: str) -> Path:
        """The folder of the sweep's records."""
        return self.out / sweep / "cells"

    def path(self, cell: Cell) -> Path:
        """The file of the cell's record."""
        return self.folder(cell.sweep) / f"{cell.key}.json"

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
            for leftover in folder.glob("*.tmp"):
                # A writer that lives holds the lock of its cell.
                with self._claim(sweep, leftover.name.split(".")[0]) as nobody_writes:
                    if nobody_writes:
                        leftover.unlink(missing_ok=True)

    def records(self, sweep: str) -> dict[str, Record]:
        """All records of the sweep by key, in the order of the keys.

        Raises:
            StoreError: a record is corrupt.
        """
        return {path.stem: _read(path) for path in sorted(self.folder(sweep).glob("*.json"))}

    def load(self, cell: Cell) -> Record | None:
        """The record of the cell, None when it is not finished.

        Raises:
            StoreError: the record is corrupt.
        """
        path = self.path(cell)
        return _read(path) if path.exists() else None

    def save(self, record: Record) -> Path:
        """Write the record, whole or not at all, and return its path.

        Waits while another process holds the claim of the same cell.

        Raises:
            StoreError: the record is malformed, or the disk does not take it.
        """
        text = json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"
        path = self.folder(str(record.get("sweep"))) / f"{record.get('key')}.json"
        _check(record, path)
        with _explained(f"Cannot write the record {path}", _RESUMES), self._lock(path.parent.parent.name, path.stem):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, text)
        return path

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
        path = self.out / sweep / "claims" / f"{key}.lock"
        if path not in self._locks:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._locks[path] = FileLock(path)
        return self._locks[path]


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Turn the system's errors into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{what}: {error.strerror or error}. {advice}") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # On a disk that fails the write's own error is the one to show; what stays is removed by the next `prepare`.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> Record:
    with _explained(f"Cannot read the record {path}", "Make it readable."):
        data = path.read_bytes()
    try:
        record = json.loads(data, parse_constant=_refuse)
    except ValueError as error:
        raise _corrupt(path, f"it is no valid JSON ({error})") from error
    _check(record, path)
    return record


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _check(record: JSON, path: Path) -> None:
    if not isinstance(record, dict):
        raise _corrupt(path, f"expected a JSON object, got a {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise _corrupt(path, f"expected format {FORMAT}, got {record.get('format')!r}")
    for field, kind in _FIELDS.items():
        if not isinstance(record.get(field), kind):
            raise _corrupt(path, f'expected "{field}" to be a {kind.__name__}, got {record.get(field)!r}')
    expected = Cell(record["sweep"], record["settings"]).key
    if record["key"] != expected:
        raise _corrupt(path, f"its settings have the key {expected}, but it says {record['key']}")
    if path.stem != expected or path.parent.parent.name != record["sweep"]:
        raise _corrupt(path, f"it belongs to {record['sweep']}/cells/{expected}.json")


def _corrupt(path: Path, why: str) -> StoreError:
    return StoreError(
        f"The record {path} is corrupt: {why}. Move it away or delete it: its cell is run again, all others are kept."
    )
