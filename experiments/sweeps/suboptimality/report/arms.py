"""The records of the sweep `suboptimality`, read by name: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from experiments.reporting.records import pick
from experiments.reporting.statistics import Mean
from experiments.sweeps.suboptimality.report.rows import mean_of_rows, share

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
    """One guide on training or on test rows. Numbers are in nats a row, by row ``[S, R]`` of ``S`` seeds and ``R`` rows."""

    guide: str
    encoder: str
    family: str
    part: str
    results: Mapping[int, Mapping]  # what the records hold of this part, by seed

    def each(self, *path: str) -> list:
        """What stands at `path` of every seed's result."""
        return [pick(result, *path) for result in self.results.values()]

    def count(self, name: str) -> int:
        """In how many rows, of all seeds, "not_converged" or "unreliable" was found."""
        return sum(map(len, self.each(name)))

    def bound(self, name: str) -> np.ndarray:
        """A bound by row, that of "ais" of the annealed rows alone; all nan where it was not measured."""
        pairs = zip(self.each("bounds", name), self.each("rows"), strict=True)
        return np.array([values or [None] * rows for values, rows in pairs], dtype=float)

    def rows(self, name: str) -> np.ndarray:
        """What `SUMS` names, by row."""
        return summed(name, {bound: self.bound(bound) for bound in SUMS[name]})

    def mean(self, name: str) -> Mean:
        """The mean of what `SUMS` names; what annealing adds to the evidence counts where it is the better bound."""
        mean, weight, raised = mean_of_rows(self.rows(name)), SUMS[name].get("iwae"), self.annealing
        if not weight or raised is None or not raised.value > 0:
            return mean
        return Mean(mean.value + weight * raised.value, math.hypot(mean.se, raised.se), mean.seeds)

    @property
    def annealing(self) -> Mean | None:
        """What annealing adds to the mean evidence of the rows that were annealed; None where it was not run."""
        if None in self.each("bounds", "ais"):
            return None
        annealed = self.bound("ais")
        return mean_of_rows(annealed - self.bound("iwae")[:, : annealed.shape[1]])

    def refined(self, steps: int, name: str) -> np.ndarray:
        """The gain by row, or the seconds by seed, of so many steps of refinement."""
        return np.array([at[name] for each in self.each("refinement") for at in each if at["steps"] == steps])

    def closed(self, steps: int) -> Mean:
        """The share of the amortization gap that so many steps close."""
        return share(self.refined(steps, "gain"), self.rows("amortization"))

    def minus(self, other: Arm | None, name: str) -> Mean | None:
        """The mean of what `SUMS` names minus the other guide's, row by row over the seeds of both; None of itself."""
        if other is None or other is self:
            return None
        common = sorted(self.results.keys() & other.results.keys())
        rows = [arm.rows(name)[[list(arm.results).index(seed) for seed in common]] for arm in (self, other)]
        return mean_of_rows(rows[0] - rows[1])


@dataclass(frozen=True)
class Section:
    """The guides of one data set, trained and measured in the same way; each on training rows, then on test rows."""

    settings: Mapping
    arms: Sequence[Arm]
    diverged: Sequence[str]

    @property
    def title(self) -> str:
        return f"{self.settings['dataset']}, {self.settings['steps']:,} steps"

    def arm(self, encoder: str, family: str, part: str) -> Arm | None:
        return next((arm for arm in self.arms if (arm.encoder, arm.family, arm.part) == (encoder, family, part)), None)


def read(records: Mapping[str, Mapping]) -> list[Section]:
    """The records by what their cells have in common.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    sections: dict[tuple, dict[tuple, list[Mapping]]] = {}
    for record in sorted(records.values(), key=lambda record: pick(record, "settings", "seed")):
        varied = {name: pick(record, "settings", name) for name in VARIED}
        fixed = tuple(sorted(record["settings"].items() - varied.items()))
        guide = (ENCODERS.index(varied["encoder"]), FAMILIES.index(varied["family"]), varied["richer"] or "")
        sections.setdefault(fixed, {}).setdefault((*guide, varied["encoder_dim"]), []).append(record)
    return [_section(dict(fixed), dict(sorted(sections[fixed].items()))) for fixed in sorted(sections, key=str)]


def _section(settings: Mapping, guides: Mapping[tuple, Sequence[Mapping]]) -> Section:
    arms, diverged = [], []
    for (encoder, family, richer, _), records in guides.items():
        named = (ENCODERS[encoder], FAMILIES[family])
        label = ", ".join(named) + (", q** a flow" if richer == "flow" else "")
        parts = {record["settings"]["seed"]: pick(record, "result", "parts") for record in records}
        diverged += [f"{label}, seed {seed}" for seed, measured in parts.items() if measured is None]
        done = {seed: measured for seed, measured in parts.items() if measured is not None}
        arms += [Arm(label, *named, part, {seed: done[seed][part] for seed in done}) for part in PARTS if done]
    return Section(settings, arms, diverged)
