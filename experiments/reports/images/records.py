"""One record of the images sweep, read by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.document import ReportError
from experiments.summary import Measured, Passage, first_passage

__all__ = ["CellRecord", "number", "pick"]


def pick(record: Mapping, *path: str) -> object:
    """The value at `path` of a record, None below a null.

    Raises:
        ReportError: if the record has no such field.
    """
    value: object = record
    for name in path:
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise ReportError(
                f"Expected {'.'.join(path)} in the record {record.get('key')!r} of the images sweep, got none.\n"
                "It was written by another version of the sweep: move its file away and run the sweep again."
            )
        value = value[name]
    return value


def number(value: object) -> float:
    """A recorded number, nan for null (which stands for everything that is not finite)."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class CellRecord:
    """One record."""

    record: Mapping

    def setting(self, name: str) -> object:
        return pick(self.record, "settings", name)

    def result(self, *path: str) -> object:
        return pick(self.record, "result", *path)

    @property
    def seed(self) -> int:
        return int(self.setting("seed"))

    @property
    def label(self) -> str:
        """The name of the guide in every figure, table and sentence."""
        guide = self.setting("guide")
        return {"constant": "constant", "factorized": "F-VI"}.get(guide, f"A-VI k={self.setting('width')}")

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the local part and of the globals."""
        return number(self.setting("lr_local")), number(self.setting("lr_global"))

    @property
    def is_tuning(self) -> bool:
        """Whether this is the tuning of a guide's learning rates, and no result."""
        return self.setting("purpose") == "tuning"

    @property
    def trials(self) -> list[CellRecord]:
        """The trials of a tuning, each as a record of its own; of what it took its cell knows the sum alone."""
        found = []
        for trial in self.result("trials"):
            rates = {name: trial[name] for name in ("lr_local", "lr_global")}
            bound = {"elbo": trial["elbo"], "elbo_se": trial["elbo_se"], "mse": None}
            result = dict.fromkeys(("refined", "noise_scale", "train_seconds", "evaluation_seconds"))
            result |= {"status": "done" if trial["diverged_at"] is None else "diverged"}
            result |= {"diverged_at": trial["diverged_at"], "final": {"train": bound, "test": None}}
            found.append(CellRecord({**self.record, "settings": self.record["settings"] | rates, "result": result}))
        return found

    @property
    def diverged(self) -> bool:
        return self.result("status") == "diverged"

    def measured(self, *path: str) -> Measured:
        """The number at `path` of the result with its Monte Carlo error, recorded as ``<name>_se`` beside an ELBO."""
        error = 0.0
        if path[-1] in ("elbo", "gain"):
            error = number(self.result(*path[:-1], f"{path[-1]}_se"))
        return Measured(number(self.result(*path)), error if math.isfinite(error) else 0.0)

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Arrays [points] by name; steps without a finite value are nan."""
        names = ("step", "seconds", "elbo", "train_mse", "test_mse")
        return {name: np.array([number(value) for value in self.result("curve", name) or ()]) for name in names}

    def passage(self, name: str, level: float) -> Passage | None:
        """When the curve of `name` first met `level`: an ELBO from below, an MSE from above.

        A run that diverged afterwards has not got there.
        """
        values = self.curve[name]
        met = values >= level if name == "elbo" else values <= level
        return first_passage(self.curve["step"], self.curve["seconds"], met & (not self.diverged))
