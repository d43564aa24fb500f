"""The records of the sweep `suboptimality`, read by name: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.reporting.document import pick
from experiments.reporting.statistics import Mean

PARTS = ("train", "test")
ENCODERS, FAMILIES = ("small", "wide", "conv"), ("diagonal", "full", "flow")
TITLES = {"digits": "digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
#: Settings that differ between the cells of one section.
VARIED = ("encoder", "encoder_dim", "family", "richer", "seed")


@dataclass(frozen=True, eq=False)
class Arm:
    """The cells of one guide, by seed; numbers are in nats a row.

    Values by row are arrays ``[S, R]`` of ``S`` seeds and ``R`` rows; every seed has the same rows.
    """

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
        """``[S, R]`` of a bound by its name in the records, ``[S, A]`` of "ais"; all nan where it was not measured."""
        pairs = zip(self.each(part, "bounds", name), self.each(part, "rows"), strict=True)
        return np.array([values or [None] * rows for values, rows in pairs], dtype=float)

    def amortization(self, part: str = "train") -> np.ndarray:
        return self.bound(part, "best") - self.bound(part, "elbo")

    def approximation(self, part: str = "train") -> np.ndarray:
        """By the importance-weighted bound: what annealing adds to the evidence is known for all rows together only."""
        return self.bound(part, "iwae") - self.bound(part, "best")

    def closed(self, part: str, steps: int) -> Mean:
        """The share of the amortization gap that a number of steps of refinement closes."""
        refined = self.each(part, "refinement")
        return share(
            np.array([at["gain"] for each in refined for at in each if at["steps"] == steps]), self.amortization(part)
        )

    def seconds(self, part: str, steps: int) -> float:
        taken = [at["seconds"] for each in self.each(part, "refinement") for at in each if at["steps"] == steps]
        return float(np.mean(taken)) if taken else math.nan

    def annealing(self, part: str) -> Mean | None:
        """What annealing adds to the mean evidence of the rows that were annealed; None where it was not run."""
        if any(rows is None for rows in self.each(part, "bounds", "ais")):
            return None
        annealed = self.bound(part, "ais")
        return mean_of_rows(annealed - self.bound(part, "iwae")[:, : annealed.shape[1]])

    def with_evidence(self, part: str, rows: np.ndarray, sign: int = 1) -> Mean:
        """The mean of values by row that hold the evidence with this sign; annealing counts where it is the better bound."""
        mean, raised = mean_of_rows(rows), self.annealing(part)
        if raised is None or not raised.value > 0:
            return mean
        return Mean(mean.value + sign * raised.value, math.hypot(mean.se, raised.se), mean.seeds)

    def means(self, part: str) -> dict[str, Mean]:
        """All bounds and gaps, by name."""
        best, approximation, amortization = self.bound(part, "best"), self.approximation(part), self.amortization(part)
        return {
            "evidence": self.with_evidence(part, self.bound(part, "iwae")),
            "richer": mean_of_rows(self.bound(part, "richer")),
            "best": mean_of_rows(best),
            "elbo": mean_of_rows(self.bound(part, "elbo")),
            "approximation": self.with_evidence(part, approximation),
            "closed": mean_of_rows(self.bound(part, "richer") - best),
            "amortization": mean_of_rows(amortization),
            "inference": self.with_evidence(part, approximation + amortization),
            "difference": self.with_evidence(part, amortization - approximation, sign=-1),
        }

    def flagged(self, part: str, name: str) -> int:
        """In how many rows, of all seeds, "not_converged" or "unreliable" was found."""
        return sum(map(len, self.each(part, name)))


@dataclass(frozen=True)
class Section:
    """The guides of one data set, trained and measured in the same way."""

    settings: Mapping
    arms: Sequence[Arm]

    @property
    def title(self) -> str:
        dataset = self.settings["dataset"]
        return f"{TITLES.get(dataset, dataset)}, {self.settings['steps']:,} steps"

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
        encoder, width, family, richer, seed = (pick(record, "settings", name) for name in (
            "encoder", "encoder_dim", "family", "richer", "seed"))  # fmt: skip
        fixed = tuple(sorted((name, value) for name, value in record["settings"].items() if name not in VARIED))
        arm = (ENCODERS.index(encoder), FAMILIES.index(family), richer or "", width)
        found.setdefault(fixed, {}).setdefault(arm, {})[seed] = record
    return [
        Section(dict(fixed), [Arm(ENCODERS[e], FAMILIES[f], richer or None, by_seed)
                              for (e, f, richer, _), by_seed in sorted(found[fixed].items(), key=lambda arm: arm[0])])
        for fixed in sorted(found, key=str)
    ]  # fmt: skip


def mean_of_rows(rows: np.ndarray) -> Mean:
    """The mean of ``rows [S, R]``, with its error as a statement about other rows and other seeds.

    With the mean a row over seeds :math:`m_n` and the mean a seed over rows :math:`m_s`::

        se = sqrt(var_n m_n / R + var_s m_s / S)

    The draws' error is part of both. With one seed the second term is unknown and left out.

    >>> mean_of_rows(np.array([[1.0, 3.0], [1.0, 3.0]]))
    Mean(value=2.0, se=1.0, seeds=2)
    """
    if rows.size == 0:
        return Mean()
    seeds, count = rows.shape
    variance = rows.mean(0).var(ddof=1) / count if count > 1 else math.nan
    if seeds > 1:
        variance += rows.mean(1).var(ddof=1) / seeds
    return Mean(float(rows.mean()), math.sqrt(variance), seeds)


def share(part_of: np.ndarray, whole: np.ndarray) -> Mean:
    """The ratio of two means over rows ``[S, R]``, by the delta method; unknown where the whole is not told apart from 0.

    >>> share(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]))
    Mean(value=0.5, se=0.0, seeds=1)
    """
    if part_of.size == 0 or mean_of_rows(whole).sign < 1:
        return Mean()
    ratio = part_of.mean() / whole.mean()
    error = mean_of_rows(part_of - ratio * whole)
    return Mean(float(ratio), error.se / float(whole.mean()), error.seeds)


def paired(one: Arm | None, other: Arm | None, gap: str, part: str) -> Mean | None:
    """The mean of a gap of one guide minus the other's, over the seeds that both have, row by row; None where one is none."""
    if one is None or other is None or one is other:
        return None
    common = sorted(one.done.keys() & other.done.keys())
    rows = [getattr(arm, gap)(part)[[list(arm.done).index(seed) for seed in common]] for arm in (one, other)]
    return mean_of_rows(rows[0] - rows[1])


def generalization(arm: Arm) -> Mean:
    """The mean amortization gap of test rows minus that of training rows: other rows, the same seeds."""
    test, train = arm.amortization("test"), arm.amortization("train")
    error = math.hypot(*(float(rows.mean(0).std(ddof=1)) / math.sqrt(rows.shape[1]) for rows in (test, train)))
    by_seed = test.mean(1) - train.mean(1)
    if len(by_seed) > 1:
        error = math.hypot(error, float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)))
    return Mean(float(by_seed.mean()), error, len(by_seed))
