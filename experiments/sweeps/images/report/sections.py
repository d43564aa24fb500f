"""The records of the images sweep in order: the cells of one guide, the guides of one section."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from experiments.reporting.statistics import Mean, Measured, Passage, mean_over_seeds, paired_difference
from experiments.sweeps.images.report.records import CellRecord, number, pick

#: Settings that a section holds fixed; guide, width, seed, protocol and how long is trained vary inside it.
FIXED = (
    "dataset", "architecture", "noise", "batch_size", "num_train", "data_seed", "latent_dim", "hidden_dim",
)  # fmt: skip
TITLES = {"digits": "Digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
#: Order of the protocols, wherever they stand side by side.
PROTOCOLS = ("published", "fair")
#: From constant to factorized each contains the one before; "continued" is F-VI started from an encoder's outputs.
GUIDES = ("constant", "amortized", "factorized", "continued")
#: The train MSE at which a run counts as there: Margossian and Blei (2024), and the Amortized-Bayes code.
TOLERANCES = (0.03, 0.07)


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

    @property
    def place(self) -> tuple[int, int]:
        """Constant, amortized by width, factorized, and that from an encoder's outputs."""
        return GUIDES.index(self.guide), self.width or 0

    @property
    def trained(self) -> Mean:
        """Training seconds; those of the encoder before a continuation included."""
        return self.mean("train_seconds")

    @property
    def unfinished(self) -> list[CellRecord]:
        """The runs that ended before they had converged."""
        return [cell for cell in self.done.values() if cell.converged is False]

    def passages(self, name: str, level: float) -> list[Passage]:
        found = (cell.passage(name, level) for cell in self.cells.values())
        return [passage for passage in found if passage is not None]

    @property
    def test_source(self) -> str:
        """Where the posteriors of test rows come from."""
        return str(self.first.result("final", "test", "source") or "-")

    @property
    def tuning_seconds(self) -> float:
        return float(sum(number(cell.result("train_seconds")) for cell in self.tuning)) if self.tuning else math.nan


@dataclass(frozen=True)
class Section:
    """The guides that compare: one data set, architecture, noise and sizes, under both protocols."""

    settings: Mapping[str, object]
    arms: tuple[Arm, ...]
    left_out: tuple[CellRecord, ...] = ()  # cells that were trained in another way than those their arm reports
    suffix: str = ""  # tells sections apart that differ in a setting their title does not show

    @property
    def name(self) -> str:
        return "-".join(str(self.settings[name]) for name in ("dataset", "architecture", "noise")) + self.suffix

    @property
    def title(self) -> str:
        fixed = self.settings
        data = TITLES.get(fixed["dataset"], fixed["dataset"])
        return f"{data}, {fixed['architecture']} decoder, {fixed['noise']} noise{self.suffix}"

    @property
    def protocols(self) -> list[str]:
        present = {arm.protocol for arm in self.arms}
        return [protocol for protocol in PROTOCOLS if protocol in present]

    @property
    def labels(self) -> list[str]:
        """The guides from constant over growing width to factorized."""
        return list(dict.fromkeys(arm.label for arm in sorted(self.arms, key=lambda arm: arm.place)))

    def under(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.protocol == protocol]

    def arm(self, protocol: str, label: str) -> Arm | None:
        return next((arm for arm in self.under(protocol) if arm.label == label), None)

    def amortized(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.under(protocol) if arm.guide == "amortized"]

    def runs(self, protocol: str) -> dict[int, Arm]:
        """By seed, the F-VI that was trained to the highest bound: from its own start, or from an encoder's outputs."""
        return highest([arm for arm in self.under(protocol) if arm.guide in ("factorized", "continued")])

    def starts(self, protocol: str) -> dict[int, Arm]:
        """By seed, the arm that F-VI's bound comes from: such a run or, of the fair protocol, A-VI, which it contains."""
        runs = self.runs(protocol)
        arms = list(dict.fromkeys(runs.values()))
        return highest(arms + self.amortized(protocol)) if arms and protocol == "fair" else runs

    def factorized(self, protocol: str) -> dict[int, Measured]:
        """F-VI's final training bound by seed, the best of its starts."""
        return {seed: arm.each("final", "train", "elbo")[seed] for seed, arm in self.starts(protocol).items()}

    def joint_gap(self, arm: Arm) -> Mean:
        """F-VI's final training bound minus the arm's, paired by seed."""
        return paired_difference(self.factorized(arm.protocol), arm.each("final", "train", "elbo"))

    def mean_image(self, rows: str) -> float:
        """The MSE of predicting the mean training image, on "train" or "test" rows."""
        return mean_over_seeds(
            cell.measured("mean_image_mse", rows) for arm in self.arms for cell in arm.cells.values()
        ).value

    def tells(self, tolerance: float) -> bool:
        """Whether it takes more than the mean image to meet a tolerance of the train MSE."""
        return not self.mean_image("train") <= tolerance


def highest(arms: Sequence[Arm]) -> dict[int, Arm]:
    """By seed, the arm with the highest final training bound."""
    found: dict[int, tuple[float, Arm]] = {}
    for arm in arms:
        for seed, bound in arm.each("final", "train", "elbo").items():
            if bound.value > found.get(seed, (-math.inf, arm))[0]:
                found[seed] = bound.value, arm
    return {seed: arm for seed, (_, arm) in sorted(found.items())}


def sections(cells: Sequence[CellRecord]) -> list[Section]:
    """The records sorted into sections: results into arms, tuning beside the fair arms that it served."""
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


def section(fixed: Mapping[str, object], cells: Sequence[CellRecord], tunings: Sequence[CellRecord]) -> Section:
    """One section from its cells and every tuning cell of the store."""
    grouped: dict[tuple, list[CellRecord]] = {}
    for cell in cells:
        grouped.setdefault((cell.setting("protocol"), cell.label), []).append(cell)
    arms, left_out = [], []
    for members in grouped.values():
        chosen = most_repeated(members)
        kept = [cell for cell in members if cell.variant == chosen]
        left_out += [cell for cell in members if cell.variant != chosen]
        arms.append(arm_of(kept, [cell for cell in tunings if served(cell, kept[0])]))
        if further := [cell.continuation for cell in kept if cell.continuation]:
            arms.append(arm_of(further))
    return Section(
        fixed, tuple(sorted(arms, key=lambda arm: (PROTOCOLS.index(arm.protocol), arm.place))), tuple(left_out)
    )


def arm_of(cells: Sequence[CellRecord], tunings: Sequence[CellRecord] = ()) -> Arm:
    first = cells[0]
    by_seed = {cell.seed: cell for cell in sorted(cells, key=lambda cell: cell.seed)}
    guide, width, protocol = (first.setting(name) for name in ("guide", "width", "protocol"))
    return Arm(first.label, guide, width, protocol, by_seed, tuple(tunings))


def most_repeated(members: Sequence[CellRecord]) -> str:
    """Of several ways of training in one arm, the one with most seeds, then the one run last."""
    by_variant: dict[str, list[CellRecord]] = {}
    for cell in members:
        by_variant.setdefault(cell.variant, []).append(cell)
    return max(by_variant, key=lambda one: (len(by_variant[one]), max(started(cell) for cell in by_variant[one])))


def started(cell: CellRecord) -> str:
    return str(pick(cell.record, "provenance", "started"))


def served(tuning: CellRecord, result: CellRecord) -> bool:
    """Whether a tuning cell belongs to the tuning of this result: all but their lengths, seeds and rates agree."""
    return all(tuning.setting(name) == result.setting(name) for name in (*FIXED, "protocol", "guide", "width"))
