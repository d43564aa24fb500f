"""The records of the sweep `suboptimality`, read by name: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

from experiments.reporting.records import pick
from experiments.reporting.statistics import Mean
from experiments.sweeps.suboptimality.report.rows import mean_between, mean_of_rows, share

PARTS = ("train", "test")
ENCODERS, FAMILIES = ("small", "wide", "conv"), ("diagonal", "full", "flow")
#: Settings that differ between the cells of one section.
VARIED = ("encoder", "encoder_dim", "family", "richer", "seed")
#: What is told of a guide: sums of the bounds of a row, by their names in the records, where "iwae" is the evidence.
SUMS = {
    "evidence": {"iwae": 1},
    "richer": {"richer": 1},
    "best": {"best": 1},
    "elbo": {"elbo": 1},
    "approximation": {"iwae": 1, "best": -1},
    "closed": {"richer": 1, "best": -1},
    "amortization": {"best": 1, "elbo": -1},
    "inference": {"iwae": 1, "elbo": -1},
    "difference": {"best": 2, "elbo": -1, "iwae": -1},
    "above the mean image": {"iwae": 1, "mean_image": -1},
}
Bound = TypeVar("Bound", float, np.ndarray)


def summed(name: str, bounds: Mapping[str, Bound]) -> Bound:
    return sum(weight * bounds[bound] for bound, weight in SUMS[name].items())


@dataclass(frozen=True, eq=False)
class Arm:
    """The cells of one guide, by seed. Numbers are in nats a row, by row ``[S, R]`` of ``S`` seeds and ``R`` rows."""

    encoder: str
    family: str
    richer: str | None
    records: Mapping[int, Mapping]

    @property
    def label(self) -> str:
        """The name of the guide in every figure, table and sentence."""
        return f"{self.encoder}, {self.family}" + (", q** a flow" if self.richer == "flow" else "")

    @cached_property
    def done(self) -> dict[int, Mapping]:
        return {seed: record for seed, record in self.records.items() if pick(record, "result", "status") == "done"}

    def each(self, part: str, *path: str) -> list:
        """What stands at `path` of a part of every seed's result."""
        return [pick(record, "result", "parts", part, *path) for record in self.done.values()]

    def bound(self, part: str, name: str) -> np.ndarray:
        """A bound by row, that of "ais" of the annealed rows alone; all nan where it was not measured."""
        pairs = zip(self.each(part, "bounds", name), self.each(part, "rows"), strict=True)
        return np.array([values or [None] * rows for values, rows in pairs], dtype=float)

    def rows(self, part: str, name: str) -> np.ndarray:
        """What `SUMS` names, by row."""
        return summed(name, {bound: self.bound(part, bound) for bound in SUMS[name]})

    def mean(self, part: str, name: str) -> Mean:
        """The mean of what `SUMS` names; what annealing adds to the evidence counts where it is the better bound."""
        mean, weight, raised = mean_of_rows(self.rows(part, name)), SUMS[name].get("iwae"), self.annealing(part)
        if not weight or raised is None or not raised.value > 0:
            return mean
        return Mean(mean.value + weight * raised.value, math.hypot(mean.se, raised.se), mean.seeds)

    def annealing(self, part: str) -> Mean | None:
        """What annealing adds to the mean evidence of the rows that were annealed; None where it was not run."""
        if None in self.each(part, "bounds", "ais"):
            return None
        annealed = self.bound(part, "ais")
        return mean_of_rows(annealed - self.bound(part, "iwae")[:, : annealed.shape[1]])

    def refined(self, part: str, steps: int, name: str) -> np.ndarray:
        """The gain by row, or the seconds by seed, of so many steps of refinement."""
        return np.array([at[name] for each in self.each(part, "refinement") for at in each if at["steps"] == steps])

    def closed(self, part: str, steps: int) -> Mean:
        """The share of the amortization gap that so many steps close."""
        return share(self.refined(part, steps, "gain"), self.rows(part, "amortization"))

    def minus(self, other: Arm | None, name: str, part: str) -> Mean | None:
        """The mean of what `SUMS` names minus the other guide's, row by row over the seeds of both; None of itself."""
        if other is None or other is self:
            return None
        common = sorted(self.done.keys() & other.done.keys())
        rows = [arm.rows(part, name)[[list(arm.done).index(seed) for seed in common]] for arm in (self, other)]
        return mean_of_rows(rows[0] - rows[1])

    @property
    def generalization(self) -> Mean:
        """The amortization gap of test rows minus that of training rows."""
        return mean_between(*(self.rows(part, "amortization") for part in ("test", "train")))


@dataclass(frozen=True)
class Section:
    """The guides of one data set, trained and measured in the same way."""

    settings: Mapping
    arms: Sequence[Arm]

    @property
    def title(self) -> str:
        return f"{self.settings['dataset']}, {self.settings['steps']:,} steps"

    @property
    def measured(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.done]

    def arm(self, encoder: str, family: str) -> Arm | None:
        return next((arm for arm in self.measured if (arm.encoder, arm.family) == (encoder, family)), None)


def read(records: Mapping[str, Mapping]) -> list[Section]:
    """The records by what their cells have in common.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found: dict[tuple, dict[tuple, dict[int, Mapping]]] = {}
    for record in sorted(records.values(), key=lambda record: pick(record, "settings", "seed")):
        varied = {name: pick(record, "settings", name) for name in VARIED}
        fixed = tuple(sorted(record["settings"].items() - varied.items()))
        arm = (ENCODERS.index(varied["encoder"]), FAMILIES.index(varied["family"]), varied["richer"] or "")
        found.setdefault(fixed, {}).setdefault((*arm, varied["encoder_dim"]), {})[varied["seed"]] = record
    sections = []
    for fixed in sorted(found, key=str):
        arms = [
            Arm(ENCODERS[e], FAMILIES[f], richer or None, found[fixed][e, f, richer, width])
            for e, f, richer, width in sorted(found[fixed])
        ]
        sections.append(Section(dict(fixed), arms))
    return sections
