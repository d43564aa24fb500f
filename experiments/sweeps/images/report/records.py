"""One record of the images sweep, read by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

import numpy as np

from experiments.reporting.document import ReportError
from experiments.reporting.statistics import Measured, Passage, first_passage

__all__ = ["CellRecord", "most_at_once", "number", "pick", "read"]


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


def complete(record: Mapping) -> Mapping:
    """The record with null for what records of before convergence was a criterion do not hold."""
    unknown = {"share": None, "continued": None}
    settings = unknown | dict(record["settings"])
    return {**record, "settings": settings, "result": {"convergence": None, "continued": None} | dict(record["result"])}


def read(records: Mapping[str, Mapping]) -> list[CellRecord]:
    """The records in the order of their keys."""
    return [CellRecord(complete(record)) for _, record in sorted(records.items())]


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
        guide, width = self.setting("guide"), self.setting("width")
        named = {"constant": "constant", "factorized": "F-VI", "continued": f"F-VI from k={width}"}
        return named.get(guide, f"A-VI k={width}")

    @property
    def variant(self) -> str:
        """The settings of the training itself: cells that differ in one are not repetitions of each other."""
        names = ("lr_local", "lr_global", "steps", "share", "continued")
        return ", ".join(f"{name} {self.setting(name)}" for name in names if self.setting(name) is not None)

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
            result = dict.fromkeys(("refined", "convergence", "noise_scale", "train_seconds", "evaluation_seconds"))
            result |= {"status": "done" if trial["diverged_at"] is None else "diverged"}
            result |= {"diverged_at": trial["diverged_at"], "final": {"train": bound, "test": None}}
            found.append(CellRecord({**self.record, "settings": self.record["settings"] | rates, "result": result}))
        return found

    @property
    def continuation(self) -> CellRecord | None:
        """F-VI from this encoder's outputs as a record of its own, its steps and seconds counted from A-VI's start."""
        further = self.result("continued")
        if further is None:
            return None
        before = {"step": self.steps, "seconds": number(self.result("train_seconds"))}
        curve = {name: [value + before.get(name, 0) for value in values] if name in before else values
                 for name, values in further["curve"].items()}  # fmt: skip
        unknown = dict.fromkeys(("refined", "images", "noise_scale", "evaluation_seconds", "parameters", "continued"))
        result = unknown | {name: further[name] for name in ("status", "diverged_at", "convergence")}
        if judged := further["convergence"]:
            result["convergence"] = {**judged, "steps": before["step"] + judged["steps"]}
        result |= {"curve": curve, "mean_image_mse": self.result("mean_image_mse")}
        result["train_seconds"] = before["seconds"] + number(further["train_seconds"])
        result["final"] = {"train": pick(further, "final", "train"), "test": None}
        settings = {**self.record["settings"], "guide": "continued", **self.record["settings"]["continued"]}
        return CellRecord({**self.record, "settings": settings, "result": result})

    @property
    def steps(self) -> float:
        """Steps taken, those of the encoder before a continuation included."""
        taken = self.result("convergence", "steps")
        return number(self.result("curve", "step")[-1] if taken is None else taken)

    @property
    def converged(self) -> bool | None:
        """Whether the last half of the steps gained less than the stated share of all; None where nobody has looked.

        A bound that fell by more than that share stands as little still as one that rose by it.
        """
        fell = -number(self.result("convergence", "late_gain"))
        fallen = fell > number(self.result("convergence", "share")) * number(self.result("convergence", "rise"))
        judged = self.result("convergence", "converged")
        return judged and not fallen

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
        names = ("step", "seconds", "elbo", "elbo_se", "train_mse", "test_mse")
        return {name: np.array([number(value) for value in self.result("curve", name) or ()]) for name in names}

    def passage(self, name: str, level: float) -> Passage | None:
        """When the curve of `name` first met `level`: an ELBO from below, an MSE from above.

        A run that diverged afterwards has not got there.
        """
        values = self.curve[name]
        met = values >= level if name == "elbo" else values <= level
        return first_passage(self.curve["step"], self.curve["seconds"], met & (not self.diverged))

    def at(self, unit: str, place: float) -> Measured:
        """The ELBO that the curve has reached by a step or second, between evaluations by a line.

        The highest so far: at the beginning of a round a bound falls, and what was reached before could have been kept.
        """
        known = np.isfinite(self.curve["elbo"])
        if self.diverged or not known.any() or not math.isfinite(place):
            return Measured(math.nan)
        points, reached = self.curve[unit][known], np.maximum.accumulate(self.curve["elbo"][known])
        error = float(np.interp(place, points, self.curve["elbo_se"][known]))
        return Measured(float(np.interp(place, points, reached)), error if math.isfinite(error) else 0.0)

    @property
    def last(self) -> Measured:
        """The last point of the curve of the ELBO."""
        ends = [self.curve[name][-1:] for name in ("elbo", "elbo_se")]
        return Measured(*(float(end[0]) if len(end) else math.nan for end in ends))


def most_at_once(cells: Sequence[CellRecord]) -> int:
    """The largest number of cells of one machine whose running times overlap."""
    events = []
    for cell in cells:
        machine = str(pick(cell.record, "provenance", "machine"))
        begin = datetime.fromisoformat(str(pick(cell.record, "provenance", "started")))
        end = begin + timedelta(seconds=number(pick(cell.record, "provenance", "seconds")))
        events += [(machine, end, -1), (machine, begin, 1)]
    running, most = {}, 0
    for machine, _, change in sorted(events, key=lambda event: (event[1], event[2])):
        running[machine] = running.get(machine, 0) + change
        most = max(most, running[machine])
    return most
