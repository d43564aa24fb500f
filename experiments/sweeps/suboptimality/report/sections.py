"""The records of the sweep `suboptimality`, read by name: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.reporting.document import ReportError
from experiments.reporting.statistics import Mean

PARTS = ("train", "test")
ENCODERS, FAMILIES = ("small", "wide", "conv"), ("diagonal", "full", "flow")
TITLES = {"digits": "digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST"}
#: Settings that differ between the cells of one section.
VARIED = ("encoder", "encoder_dim", "family", "richer", "seed")


@dataclass(frozen=True)
class Arm:
    """The cells of one guide, by seed; numbers are in nats a row.

    Values by row are arrays ``[S, R]`` of ``S`` seeds and ``R`` rows; every seed has the same rows.
    """

    encoder: str
    family: str
    richer: str | None
    cells: Mapping[int, Mapping]

    @property
    def label(self) -> str:
        """The name of the guide in every figure, table and sentence."""
        return f"{self.encoder}, {self.family}" + (", q** a flow" if self.richer == "flow" else "")

    @cached_property
    def done(self) -> dict[int, Mapping]:
        return {seed: cell["result"] for seed, cell in sorted(self.cells.items()) if cell["result"]["status"] == "done"}

    def part(self, part: str) -> list[Mapping]:
        return [result["parts"][part] for result in self.done.values()]

    def bound(self, part: str, name: str) -> np.ndarray:
        """``[S, R]`` of a bound by its name in the records, ``[S, A]`` of "ais"; all nan where it was not measured."""
        return np.array([of["bounds"][name] or [None] * of["rows"] for of in self.part(part)], dtype=float)

    def amortization(self, part: str) -> np.ndarray:
        return self.bound(part, "best") - self.bound(part, "elbo")

    def approximation(self, part: str) -> np.ndarray:
        """By the importance-weighted bound: what annealing adds to the evidence is known for all rows together only."""
        return self.bound(part, "iwae") - self.bound(part, "best")

    def gain(self, part: str, steps: int) -> np.ndarray:
        """What a number of steps of refinement gains."""
        return np.array(
            [at["gain"] for of in self.part(part) for at in of["refinement"] if at["steps"] == steps], float
        )

    def seconds(self, part: str, steps: int) -> float:
        taken = [at["seconds"] for of in self.part(part) for at in of["refinement"] if at["steps"] == steps]
        return float(np.mean(taken)) if taken else math.nan

    def raised(self, part: str) -> Mean:
        """What annealing adds to the mean evidence of the rows that were annealed, where it is the better bound there."""
        if any(of["bounds"]["ais"] is None for of in self.part(part)):
            return Mean(0.0, 0.0, len(self.done))
        annealed = self.bound(part, "ais")
        change = mean_of_rows(annealed - self.bound(part, "iwae")[:, : annealed.shape[1]])
        return change if change.value > 0 else Mean(0.0, 0.0, change.seeds)

    def with_evidence(self, part: str, rows: np.ndarray, sign: int = 1) -> Mean:
        """The mean of values by row that hold the evidence with this sign, with what annealing adds to it."""
        mean, raised = mean_of_rows(rows), self.raised(part)
        return Mean(mean.value + sign * raised.value, math.hypot(mean.se, raised.se), mean.seeds)

    def flagged(self, part: str, name: str) -> int:
        """In how many rows, of all seeds, "not_converged" or "unreliable" was found."""
        return sum(len(of[name]) for of in self.part(part))

    def rows(self, part: str) -> int:
        """The rows of all seeds."""
        return sum(of["rows"] for of in self.part(part))


@dataclass(frozen=True)
class Section:
    """The guides of one data set, trained and measured in the same way."""

    settings: Mapping
    arms: Sequence[Arm]

    @property
    def name(self) -> str:
        return f"{self.settings['dataset']}-{self.settings['steps']}"

    @property
    def title(self) -> str:
        dataset = self.settings["dataset"]
        return f"{TITLES.get(dataset, dataset)}, {self.settings['steps']:,} steps"

    @property
    def measured(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.done]

    def arm(self, encoder: str, family: str) -> Arm | None:
        return next((arm for arm in self.measured if (arm.encoder, arm.family) == (encoder, family)), None)


def sections(records: Mapping[str, Mapping]) -> list[Section]:
    """The records by what their cells have in common.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found: dict[tuple, dict[tuple, dict[int, Mapping]]] = {}
    for key, record in sorted(records.items()):
        try:
            s = record["settings"]
            fixed = tuple(sorted((name, value) for name, value in s.items() if name not in VARIED))
            arm = (ENCODERS.index(s["encoder"]), FAMILIES.index(s["family"]), s["richer"] or "", s["encoder_dim"])
            found.setdefault(fixed, {}).setdefault(arm, {})[s["seed"]] = record
            _check(record["result"])
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(
                f"Expected records of the sweep suboptimality, got {key!r}, in which this is missing: {error}.\n"
                "It was written by another version of the sweep: move its file away and run the sweep again."
            ) from error
    order = sorted(found, key=lambda fixed: [(name, str(value)) for name, value in fixed])
    return [
        Section(dict(fixed), [Arm(ENCODERS[e], FAMILIES[f], r or None, found[fixed][e, f, r, w])
                              for e, f, r, w in sorted(found[fixed])])
        for fixed in order
    ]  # fmt: skip


def _check(result: Mapping) -> None:
    if result["status"] == "done":
        for part in PARTS:
            of = result["parts"][part]
            for name in ("not_converged", "unreliable", "refinement", "rows"):
                of[name]
            for name in ("elbo", "best", "richer", "iwae", "ais", "mean_image"):
                of["bounds"][name]


def mean_of_rows(rows: np.ndarray) -> Mean:
    """The mean of ``rows [S, R]``, with its error as a statement about other rows and other seeds.

    With the mean a row over seeds :math:`m_n` and the mean a seed over rows :math:`m_s`::

        se = sqrt(var_n m_n / R + var_s m_s / S)

    The draws' error is part of both. With one seed the second term is unknown and left out.

    >>> mean_of_rows(np.array([[1.0, 3.0], [1.0, 3.0]]))
    Mean(value=2.0, se=1.0, seeds=2)
    """
    if rows.size == 0:
        return Mean(math.nan, math.nan, 0)
    seeds, count = rows.shape
    variance = rows.mean(0).var(ddof=1) / count if count > 1 else math.nan
    if seeds > 1:
        variance += rows.mean(1).var(ddof=1) / seeds
    return Mean(float(rows.mean()), math.sqrt(variance), seeds)


def share(part_of: np.ndarray, whole: np.ndarray) -> Mean:
    """The ratio of two means over rows ``[S, R]``, by the delta method; nan where the whole is not told apart from 0.

    >>> share(np.array([[1.0, 2.0]]), np.array([[2.0, 4.0]]))
    Mean(value=0.5, se=0.0, seeds=1)
    """
    if part_of.size == 0 or mean_of_rows(whole).sign < 1:
        return Mean(math.nan, math.nan, 0)
    ratio = part_of.mean() / whole.mean()
    error = mean_of_rows(part_of - ratio * whole)
    return Mean(float(ratio), error.se / float(whole.mean()), error.seeds)


def paired(one: Arm, other: Arm, rows_of: Callable[[Arm], np.ndarray]) -> Mean:
    """The mean of one guide's rows minus the other's, over the seeds that both have, row by row."""
    common = sorted(one.done.keys() & other.done.keys())
    if not common:
        return Mean(math.nan, math.nan, 0)
    of = [rows_of(arm)[[sorted(arm.done).index(seed) for seed in common]] for arm in (one, other)]
    return mean_of_rows(of[0] - of[1])


def generalization(arm: Arm) -> Mean:
    """The mean amortization gap of test rows minus that of training rows: other rows, the same seeds."""
    test, train = arm.amortization("test"), arm.amortization("train")
    error = math.hypot(*(float(rows.mean(0).std(ddof=1)) / math.sqrt(rows.shape[1]) for rows in (test, train)))
    by_seed = test.mean(1) - train.mean(1)
    if len(by_seed) > 1:
        error = math.hypot(error, float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed)))
    return Mean(float(by_seed.mean()), error, len(by_seed))
