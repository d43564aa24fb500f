"""Records as text: one JSON object on a line, its checksum before all else, and every earlier format read as well."""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from experiments.runner.cell import JSON, Cell

__all__ = [
    "FORMAT",
    "MOST_BYTES",
    "DamagedError",
    "NewerFormatError",
    "Record",
    "check_place",
    "decode",
    "encode",
    "interned",
]

FORMAT = 2
MOST_BYTES = 1 << 26
"""No record is larger: a file that is, is none, and a result that would be fails its cell."""

Record: TypeAlias = dict[str, JSON]

_FIELDS = {"sweep": str, "key": str, "settings": dict, "provenance": dict}

# A file of format 2 or later begins with the SHA-256 of all that follows it, in 64 hexadecimal digits. It is of bytes, not of
# what they mean, so that no flipped bit passes.
_SEALED = re.compile(rb'\{"checksum":"([0-9a-f]{64})",')

# From each earlier format to the next. Format 1 is format 2 without a checksum.
_MIGRATIONS: Mapping[int, Callable[[Record], Record]] = {1: lambda record: record}


class DamagedError(ValueError):
    """The text is no record of this cell: cut, changed since it was written, or of something else."""


class NewerFormatError(ValueError):
    """The text is a whole record of a format that only a later version of this code knows."""


def encode(record: Record) -> bytes:
    """The text of a record, or of the mark of a failed cell, which has a `failure` in place of a `result`.

    Raises:
        DamagedError: a field is missing or of the wrong type, or the key is not that of the settings.
        ValueError: it holds what JSON lacks.
    """
    _check(record)
    if record.get("format") != FORMAT:
        raise DamagedError(f"expected format {FORMAT}, got {record.get('format')!r}")
    rest = json.dumps(record, allow_nan=False, separators=(",", ":")).encode("ascii")[1:] + b"\n"
    return b'{"checksum":"%s",' % _checksum(rest) + rest


def decode(content: bytes) -> tuple[Record, int]:
    """The record that a file holds, in the present format, and the format that it is written in.

    Raises:
        DamagedError: the file holds no record, or not as it was written.
        NewerFormatError: it is written in a format to come.
    """
    seal = _SEALED.match(content)
    if seal and seal[1] != _checksum(content[seal.end() :]):
        raise DamagedError("its checksum is another: it was cut or changed since it was written")
    record = _parsed(content)
    if seal:
        del record["checksum"]
    written = record.get("format")
    if not isinstance(written, int) or isinstance(written, bool) or written < 1:
        raise DamagedError(f"expected the number of a format, up to {FORMAT}, got {written!r}")
    if not seal and written > 1:
        raise DamagedError(f"expected a checksum before all else, as format {written} has, got none")
    if written > FORMAT:
        raise NewerFormatError(f"it has format {written}, and this version knows those up to {FORMAT}")
    for old in range(written, FORMAT):
        record = {**_MIGRATIONS[old](record), "format": old + 1}
    _check(record)
    return interned(record), written


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode("ascii")


def _parsed(content: bytes) -> Record:
    try:
        record = json.loads(content, parse_constant=_refuse, parse_float=_finite)
    # Brackets in brackets end in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"it is no valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DamagedError(f"expected a JSON object, got a {type(record).__name__}")
    return record


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _check(record: Record) -> None:
    kinds = {**_FIELDS, **({"failure": str} if "failure" in record else {"result": dict})}
    for field, kind in kinds.items():
        if not isinstance(record.get(field), kind):
            raise DamagedError(f'expected "{field}" to be a {kind.__name__}, got {str(record.get(field))[:100]!r}')
    try:
        expected = Cell(record["sweep"], record["settings"]).key
    except ValueError as error:
        raise DamagedError(f"its settings are those of no cell ({error})") from error
    if record["key"] != expected:
        raise DamagedError(f"its settings have the key {expected}, but it says {record['key'][:100]!r}")


def interned(value: JSON) -> JSON:
    """The same value, its texts shared with all others of this process: those of a sweep's records are mostly the same."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, list):
        return [interned(item) for item in value]
    if isinstance(value, dict):
        return {sys.intern(name): interned(item) for name, item in value.items()}
    return value


def check_place(record: Record, path: Path) -> None:
    """The settings decide the name: a file of another name is a copy, or of another cell or sweep."""
    kind = "failures" if "failure" in record else "cells"
    place = (record["sweep"], kind, f"{record['key']}.json")
    if path.parts[-3:] != place:
        raise DamagedError(f"it belongs to {'/'.join(place)}")
