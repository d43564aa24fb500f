"""Fields of records, read by name."""

from __future__ import annotations

from collections.abc import Mapping


class ReportError(ValueError):
    """A report that cannot be drawn or written: what was asked for, what there is, and what to do."""


def pick(record: Mapping, *path: str) -> object:
    """The value at `path` of a record, None below a null.

    >>> pick({"result": {"elbo": -1.5, "refined": None}}, "result", "elbo")
    -1.5

    Raises:
        ReportError: if the record has no such field.
    """
    value: object = record
    for name in path:
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise ReportError(
                f"Expected {'.'.join(path)} in the record {record.get('key')!r}, got none.\n"
                "It was written by another version of the sweep: move its file away and run the sweep again."
            )
        value = value[name]
    return value
