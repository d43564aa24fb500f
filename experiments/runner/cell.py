"""A cell: what decides one run of a sweep, and the name that follows from it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

__all__ = ["JSON", "Cell"]

JSON: TypeAlias = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep: everything that decides its result, and nothing of the machine it runs on.

    Two cells are equal when their keys are. The order of the settings does not matter; `1` and `1.0` are different
    values.

    Args:
        sweep: name of the sweep, an identifier.
        settings: what decides the result, the seed included, as JSON. A copy is kept, with tuples as lists and keys as
            strings.

    Raises:
        ValueError: `sweep` is no identifier, or the settings hold what JSON lacks.

    Example:
        >>> Cell("images", {"width": 64, "seed": 0}).key
        'a4185b948fdd1838'
        >>> Cell("images", {"seed": 0, "width": 64}) == Cell("images", {"width": 64, "seed": 0})
        True
    """

    sweep: str
    settings: Mapping[str, JSON]

    def __post_init__(self) -> None:
        if not self.sweep.isidentifier():
            raise ValueError(f"Expected the name of a sweep (an identifier, it names a folder), got {self.sweep!r}.")
        try:
            settings = json.loads(json.dumps(dict(self.settings), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected settings of a cell of sweep {self.sweep} that JSON can hold: None, booleans, finite numbers, "
                f"strings, lists and dictionaries; got {self.settings!r} ({error})."
            ) from error
        object.__setattr__(self, "settings", settings)

    @cached_property
    def key(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON: sorted keys, no spaces, ASCII."""
        canonical = json.dumps({"sweep": self.sweep, "settings": self.settings}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Cell) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)
