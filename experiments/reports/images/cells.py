"""The records of the images sweep in order: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from experiments.reports.images.records import CellRecord, number, pick
from experiments.summary import Mean, Measured, Passage, mean_over_seeds, paired_difference

#: Settings that a section holds fixed; guide, width, seed, protocol and learning rates vary inside it.
FIXED = (
    "dataset", "architecture", "noise", "steps", "batch_size", "num_train", "data_seed", "latent_dim", "hidden_dim",
)  # fmt: skip
TITLES = {"digits": "digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
#: Order of the protocols, wherever they stand side by side.
PROTOCOLS = ("published", "fair")
#: The train MSE at which a run counts as there: Margossian and Blei (2024), and the Amortized-Bayes code.
TOLERANCES = (0.03, 0.07)
#: Share of the way from the constant guide's final ELBO to the best guide's that is left at the ELBO level.
ELBO_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Arm:
    """The cells of one guide under one protocol, by seed, and the tuning of its learning rates."""

    label: str
    guide: str
    width: int | None
    protocol: str
    cells: Mapping[int, CellRecord]
    tuning: tuple[CellRecord, ...] = ()

    @property
    def done(self) -> dict[int, CellRecord]:
        return {seed: cell for seed, cell in self.cells.items() if not cell.diverged}

    @property
    def first(self) -> CellRecord:
        return next(iter((self.done or self.cells).values()))

    def each(self, *path: str) -> dict[int, Measured]:
        """The number at `path` of every result that did not diverge, by seed."""
        return {seed: cell.measured(*path) for seed, cell in self.done.items()}

    def mean(self, *path: str) -> Mean:
        return mean_over_seeds(self.each(*path).values())

    def passages(self, name: str, level: float) -> list[Passage]:
        found = (cell.passage(name, level) for cell in self.cells.values())
        return [passage for passage in found if passage is not None]

    @property
    def test_source(self) -> str:
        """Where the posteriors of test rows come from."""
        return str(self.first.result("final", "test", "source") or "not recorded")

    @property
    def tuning_seconds(self) -> float:
        return float(sum(number(cell.result("train_seconds")) for cell in self.tuning)) if self.tuning else math.nan


@dataclass(frozen=True)
class Section:
    """The guides that compare: one data set, architecture, noise and length of training."""

    settings: Mapping[str, object]
    arms: tuple[Arm, ...]
    left_out: tuple[CellRecord, ...] = ()  # cells of learning rates other than those their arm reports
    suffix: str = ""  # tells sections apart that differ in a setting their title does not show

    @property
    def name(self) -> str:
        fixed = self.settings
        return "-".join(str(fixed[name]) for name in ("dataset", "architecture", "noise", "steps")) + self.suffix

    @property
    def title(self) -> str:
        fixed = self.settings
        data = TITLES.get(fixed["dataset"], fixed["dataset"])
        return f"{data}, {fixed['architecture']} decoder, {fixed['noise']} noise, {fixed['steps']:,} steps{self.suffix}"

    @property
    def protocols(self) -> list[str]:
        present = {arm.protocol for arm in self.arms}
        return [protocol for protocol in PROTOCOLS if protocol in present]

    def column(self, protocol: str) -> int:
        """Where findings about this protocol stand: beside those of the other one, if there is one."""
        return 1 + self.protocols.index(protocol) if len(self.protocols) > 1 else 0

    @property
    def labels(self) -> list[str]:
        """The guides from constant over growing width to factorized."""
        return list(dict.fromkeys(arm.label for arm in self.arms))

    def under(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.protocol == protocol]

    def arm(self, protocol: str, label: str) -> Arm | None:
        return next((arm for arm in self.under(protocol) if arm.label == label), None)

    def amortized(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.under(protocol) if arm.guide == "amortized"]

    def joint_gap(self, arm: Arm, *path: str) -> Mean:
        """F-VI's number at `path` minus the arm's, paired by seed; nothing known for F-VI itself or without it."""
        factorized = self.arm(arm.protocol, "F-VI")
        if factorized is None or arm is factorized:
            return mean_over_seeds(())
        return paired_difference(factorized.each(*path), arm.each(*path))

    def mean_image(self, rows: str) -> float:
        """The MSE of predicting the mean training image, on "train" or "test" rows."""
        return mean_over_seeds(
            cell.measured("mean_image_mse", rows) for arm in self.arms for cell in arm.cells.values()
        ).value

    @cached_property
    def span(self) -> tuple[float, float] | None:
        """Final ELBO of the constant guide and of the best guide, over protocols; None without a constant guide."""
        finals = {(arm.label, arm.protocol): arm.mean("final", "train", "elbo").value for arm in self.arms}
        constant = [value for (label, _), value in finals.items() if label == "constant" and math.isfinite(value)]
        best = max((value for value in finals.values() if math.isfinite(value)), default=math.nan)
        return (max(constant), best) if constant and best > max(constant) else None

    @property
    def elbo_level(self) -> float | None:
        return None if self.span is None else self.span[1] - ELBO_SHARE * (self.span[1] - self.span[0])

    @cached_property
    def criteria(self) -> list[tuple[str, str, float]]:
        """What "there" means, as (title, name of the curve, level): the ELBO level, and each tolerance that tells.

        A tolerance that the mean image passes measures nothing and is left to a warning.
        """
        elbo = [] if self.elbo_level is None else [(f"ELBO ≥ {self.elbo_level:,.1f}", "elbo", self.elbo_level)]
        return elbo + [(f"train MSE ≤ {level:g}", "train_mse", level) for level in TOLERANCES if self.tells(level)]

    def tells(self, tolerance: float) -> bool:
        return not self.mean_image("train") <= tolerance


def sections(records: Mapping[str, Mapping]) -> list[Section]:
    """The records sorted into sections: results into arms, tuning beside the fair arms that it served."""
    cells = [CellRecord(record) for _, record in sorted(records.items())]
    results: dict[tuple, list[CellRecord]] = {}
    for cell in cells:
        if not cell.is_tuning:
            results.setdefault(tuple(cell.setting(name) for name in FIXED), []).append(cell)
    tunings = [cell for cell in cells if cell.is_tuning]
    found = [section(dict(zip(FIXED, key, strict=True)), results[key], tunings) for key in sorted(results, key=str)]
    seen: Counter[str] = Counter()
    for place, one in enumerate(found):
        seen[one.name] += 1
        if seen[one.name] > 1:
            found[place] = replace(one, suffix=f"-{seen[one.name]}")
    return found


def section(fixed: Mapping[str, object], cells: list[CellRecord], tunings: list[CellRecord]) -> Section:
    """One section from its cells and every tuning cell of the store."""
    grouped: dict[tuple, list[CellRecord]] = {}
    for cell in cells:
        grouped.setdefault((PROTOCOLS.index(cell.setting("protocol")), *order(cell)), []).append(cell)
    arms, left_out = [], []
    for _, members in sorted(grouped.items()):
        rates = chosen_rates(members)
        kept = sorted((cell for cell in members if cell.rates == rates), key=lambda cell: cell.seed)
        left_out += [cell for cell in members if cell.rates != rates]
        first = kept[0]
        tuned = [cell for cell in tunings if first.setting("protocol") == "fair" and served(cell, first)]
        arms.append(
            Arm(
                first.label,
                first.setting("guide"),
                first.setting("width"),
                first.setting("protocol"),
                {cell.seed: cell for cell in kept},
                tuple(tuned),
            )
        )
    return Section(fixed, tuple(arms), tuple(left_out))


def order(cell: CellRecord) -> tuple[int, int]:
    """Constant, amortized by width, factorized: each contained in the next."""
    return ("constant", "amortized", "factorized").index(cell.setting("guide")), cell.setting("width") or 0


def chosen_rates(members: list[CellRecord]) -> tuple[float, float]:
    """Of several pairs of learning rates in one arm, the one with most seeds, then the one run last."""
    by_rates: dict[tuple[float, float], list[CellRecord]] = {}
    for cell in members:
        by_rates.setdefault(cell.rates, []).append(cell)
    return max(by_rates, key=lambda rates: (len(by_rates[rates]), max(started(cell) for cell in by_rates[rates])))


def started(cell: CellRecord) -> str:
    return str(pick(cell.record, "provenance", "started"))


def served(tuning: CellRecord, result: CellRecord) -> bool:
    """Whether a tuning cell belongs to the tuning of this result: all but its own length, seed and rates agree."""
    same = [name for name in FIXED if name != "steps"] + ["guide", "width"]
    return all(tuning.setting(name) == result.setting(name) for name in same)
