"""One training of the images sweep, read by name from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from experiments.reporting.records import pick
from experiments.reporting.statistics import Duration, Mean

#: What records of before convergence was a criterion do not hold.
_UNKNOWN = {"settings": {"share": None, "continued": None}, "result": {"convergence": None, "continued": None}}


def number(value: object) -> float:
    """A recorded number, nan for null (which stands for everything that is not finite)."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True, eq=False)
class Run:
    """A training, or the tuning of a guide's rates; `before`: the steps and seconds of the encoder that it went on from."""

    record: Mapping
    before: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Mapping) -> Run:
        return cls({**record, **{part: unknown | dict(pick(record, part)) for part, unknown in _UNKNOWN.items()}})

    def setting(self, name: str) -> object:
        return pick(self.record, "settings", name)

    def result(self, *path: str) -> object:
        return pick(self.record, "result", *path)

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
        """F-VI from this encoder's outputs as a run of its own."""
        further = self.result("continued")
        if further is None:
            return None
        settings = self.record["settings"] | self.setting("continued") | {"guide": "continued", "continued": None}
        # Nothing else was measured of it.
        result = dict.fromkeys(self.record["result"]) | {"mean_image_mse": self.result("mean_image_mse")} | further
        result["final"] = {"train": pick(further, "final", "train"), "test": None}
        before = {"step": self.steps, "seconds": self.seconds}
        return Run({**self.record, "settings": settings, "result": result}, before)

    @property
    def steps(self) -> float:
        taken = self.result("convergence", "steps")
        return self.curve["step"][-1] if taken is None else self.before.get("step", 0.0) + taken

    @property
    def seconds(self) -> float:
        return self.before.get("seconds", 0.0) + number(self.result("train_seconds"))

    @property
    def converged(self) -> bool | None:
        """Whether the last half of the steps gained less than the stated share of all; None where nobody has looked.

        A bound that fell by more than that share stands as little still as one that rose by it.
        """
        fell, share, rise = (number(self.result("convergence", name)) for name in ("late_gain", "share", "rise"))
        judged = self.result("convergence", "converged")
        return judged and not -fell > share * rise

    @property
    def diverged(self) -> bool:
        return self.result("status") == "diverged"

    def mean(self, *path: str) -> Mean:
        """The number at `path` of the result with its Monte Carlo error, recorded as ``<name>_se`` beside an ELBO."""
        with_error = path[-1] in ("elbo", "gain")
        error = number(self.result(*path[:-1], f"{path[-1]}_se")) if with_error else 0.0
        return Mean(number(self.result(*path)), error if math.isfinite(error) else 0.0, 1)

    @cached_property
    def curve(self) -> dict[str, np.ndarray]:
        """Arrays [points] by name, counted from the start of the encoder; steps without a finite value are nan."""
        names = ("step", "seconds", "elbo", "elbo_se", "train_mse", "test_mse")
        found = {name: np.array([number(value) for value in self.result("curve", name) or ()]) for name in names}
        return found | {name: found[name] + begin for name, begin in self.before.items()}

    def until(self, level: float, unit: str) -> Duration:
        """The steps or seconds until the ELBO first met `level`; a run that diverged afterwards has not got there."""
        met = np.flatnonzero(self.curve["elbo"] >= level)
        reached = len(met) > 0 and not self.diverged
        places = self.curve[unit][met[:1] if reached else slice(-1, None)]
        return Duration(float(places.sum()), censored=not reached)

    def at(self, unit: str, place: float) -> Mean:
        """The ELBO that the curve has reached by a step or second, between evaluations by a line.

        The highest so far: at the beginning of a round a bound falls, and what was reached before could have been kept.
        """
        known = np.isfinite(self.curve["elbo"])
        if self.diverged or not known.any() or not math.isfinite(place):
            return Mean()
        points, reached = self.curve[unit][known], np.maximum.accumulate(self.curve["elbo"][known])
        error = float(np.interp(place, points, self.curve["elbo_se"][known]))
        return Mean(float(np.interp(place, points, reached)), error if math.isfinite(error) else 0.0, 1)
