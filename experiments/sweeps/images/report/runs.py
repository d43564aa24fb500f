"""One training of the images sweep, read by name from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.reporting.document import pick
from experiments.reporting.statistics import Duration, Measured

#: What records of before convergence was a criterion do not hold.
_UNKNOWN = {"settings": {"share": None, "continued": None}, "result": {"convergence": None, "continued": None}}


def number(value: object) -> float:
    """A recorded number, nan for null (which stands for everything that is not finite)."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Run:
    """A training, or the tuning of a guide's learning rates."""

    record: Mapping

    @classmethod
    def read(cls, record: Mapping) -> Run:
        return cls({**record, **{part: unknown | dict(pick(record, part)) for part, unknown in _UNKNOWN.items()}})

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
        """The settings of the training itself: runs that differ in one are not repetitions of each other."""
        names = ("lr_local", "lr_global", "steps", "share", "continued")
        return ", ".join(f"{name} {self.setting(name)}" for name in names if self.setting(name) is not None)

    @property
    def continuation(self) -> Run | None:
        """F-VI from this encoder's outputs as a run of its own, its steps and seconds counted from A-VI's start."""
        further = self.result("continued")
        if further is None:
            return None
        before = {"step": self.steps, "seconds": number(self.result("train_seconds"))}
        curve = further["curve"] | {
            name: [value + begin for value in further["curve"][name]] for name, begin in before.items()
        }
        judged = further["convergence"] and {
            **further["convergence"],
            "steps": before["step"] + further["convergence"]["steps"],
        }
        result = {**dict.fromkeys(self.record["result"]), "mean_image_mse": self.result("mean_image_mse"), **further}
        result |= {
            "curve": curve,
            "convergence": judged,
            "final": {"train": pick(further, "final", "train"), "test": None},
        }
        result["train_seconds"] = before["seconds"] + number(further["train_seconds"])
        settings = {
            **self.record["settings"],
            "guide": "continued",
            **self.record["settings"]["continued"],
            "continued": None,
        }
        return Run({**self.record, "settings": settings, "result": result})

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
        with_error = path[-1] in ("elbo", "gain")
        error = number(self.result(*path[:-1], f"{path[-1]}_se")) if with_error else 0.0
        return Measured(number(self.result(*path)), error if math.isfinite(error) else 0.0)

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Arrays [points] by name; steps without a finite value are nan."""
        names = ("step", "seconds", "elbo", "elbo_se", "train_mse", "test_mse")
        return {name: np.array([number(value) for value in self.result("curve", name) or ()]) for name in names}

    def until(self, level: float, unit: str) -> Duration | None:
        """The steps or seconds until the ELBO first met `level`; a run that diverged afterwards has not got there."""
        places, met = self.curve[unit], self.curve["elbo"] >= level
        if not len(places):
            return None
        reached = bool(met.any()) and not self.diverged
        return Duration(float(places[met.argmax() if reached else -1]), censored=not reached)

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
    def last(self) -> float:
        """The last point of the curve of the ELBO."""
        return float(self.curve["elbo"][-1]) if len(self.curve["elbo"]) else math.nan
