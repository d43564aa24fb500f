"""The records of the images sweep in order: the runs of one guide, the guides of one section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from experiments.reporting.document import pick
from experiments.reporting.statistics import Mean, Measured, mean_over_seeds, paired_difference
from experiments.sweeps.images.report.runs import Run, number

#: Settings that a section holds fixed; guide, width, seed, protocol and how long is trained vary inside it.
FIXED = ("dataset", "architecture", "noise", "batch_size", "num_train", "data_seed", "latent_dim", "hidden_dim")
TITLES = {"digits": "Digits", "mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}
#: Order of the protocols, wherever they stand side by side.
PROTOCOLS = ("published", "fair")
#: From constant to factorized each contains the one before; "continued" is F-VI started from an encoder's outputs.
GUIDES = ("constant", "amortized", "factorized", "continued")
BOUND = ("final", "train", "elbo")


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one guide under one protocol, by seed, and the tuning of its learning rates."""

    label: str
    guide: str
    width: int | None
    protocol: str
    runs: Mapping[int, Run]
    tuning: tuple[Run, ...] = ()

    @property
    def done(self) -> dict[int, Run]:
        return {seed: run for seed, run in self.runs.items() if not run.diverged}

    @property
    def first(self) -> Run:
        return next(iter((self.done or self.runs).values()))

    def each(self, *path: str) -> dict[int, Measured]:
        """The number at `path` of every result that did not diverge, by seed."""
        return {seed: run.measured(*path) for seed, run in self.done.items()}

    def mean(self, *path: str) -> Mean:
        return mean_over_seeds(self.each(*path).values())

    @property
    def unfinished(self) -> list[Run]:
        """The runs that ended before they had converged."""
        return [run for run in self.done.values() if run.converged is False]

    @property
    def steps(self) -> Mean:
        return mean_over_seeds(Measured(run.steps) for run in self.done.values())

    @property
    def tuning_seconds(self) -> float | None:
        return sum(number(run.result("train_seconds")) for run in self.tuning) if self.tuning else None


@dataclass(frozen=True)
class Section:
    """The guides that compare: one data set, architecture, noise and sizes, under both protocols."""

    settings: Mapping[str, object]
    arms: tuple[Arm, ...]
    left_out: tuple[Run, ...] = ()  # runs that were trained in another way than those their arm reports

    @property
    def title(self) -> str:
        fixed = self.settings
        data = TITLES.get(fixed["dataset"], fixed["dataset"])
        return f"{data}, {fixed['architecture']} decoder, {fixed['noise']} noise, {fixed['latent_dim']} latents"

    @property
    def protocols(self) -> list[str]:
        present = {arm.protocol for arm in self.arms}
        return [protocol for protocol in PROTOCOLS if protocol in present]

    def under(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.protocol == protocol]

    def arm(self, protocol: str, label: str) -> Arm | None:
        return next((arm for arm in self.under(protocol) if arm.label == label), None)

    def amortized(self, protocol: str) -> list[Arm]:
        return [arm for arm in self.under(protocol) if arm.guide == "amortized"]

    def best_amortized(self, protocol: str, *, least: int = 1) -> Arm | None:
        """The amortized guide of at least this width, failing that the widest, with the highest final training bound."""
        arms = [arm for arm in self.amortized(protocol) if arm.mean(*BOUND).known]
        eligible = [arm for arm in arms if arm.width >= least] or arms[-1:]
        return max(eligible, key=lambda arm: arm.mean(*BOUND).value, default=None)

    def trained(self, protocol: str) -> dict[int, Arm]:
        """By seed, the F-VI that was trained to the highest bound: from its own start, or from an encoder's outputs."""
        return highest(arm for arm in self.under(protocol) if arm.guide in ("factorized", "continued"))

    def starts(self, protocol: str) -> dict[int, Arm]:
        """By seed, the arm that F-VI's bound comes from: such a run or, of the fair protocol, A-VI, which it contains."""
        trained = self.trained(protocol)
        if not trained or protocol != "fair":
            return trained
        return highest([*dict.fromkeys(trained.values()), *self.amortized(protocol)])

    def factorized(self, protocol: str) -> dict[int, Measured]:
        """F-VI's final training bound by seed, the best of its starts."""
        return {seed: arm.each(*BOUND)[seed] for seed, arm in self.starts(protocol).items()}

    def joint_gap(self, arm: Arm) -> Mean | None:
        """F-VI's final training bound minus the arm's, paired by seed; None of the F-VI that gives the bound in every seed."""
        if arm.guide in ("factorized", "continued") and set(self.starts(arm.protocol).values()) == {arm}:
            return None
        return paired_difference(self.factorized(arm.protocol), arm.each(*BOUND))

    def mean_image(self, rows: str) -> float:
        """The MSE of predicting the mean training image, on "train" or "test" rows."""
        found = (run.measured("mean_image_mse", rows) for arm in self.arms for run in arm.runs.values())
        return mean_over_seeds(found).value


def place(arm: Arm) -> tuple[int, int]:
    return GUIDES.index(arm.guide), arm.width or 0


def highest(arms: Iterable[Arm]) -> dict[int, Arm]:
    """By seed, the arm with the highest final training bound."""
    found = [
        (seed, bound.value, arm)
        for arm in arms
        for seed, bound in arm.each(*BOUND).items()
        if bound.value == bound.value
    ]
    seeds = sorted({seed for seed, *_ in found})
    return {seed: max((each for each in found if each[0] == seed), key=lambda each: each[1])[2] for seed in seeds}


def read(records: Mapping[str, Mapping]) -> list[Section]:
    """The records sorted into sections: results into arms, tuning beside the fair arms that it served."""
    runs = [Run.read(record) for _, record in sorted(records.items())]
    results: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.setting("purpose") != "tuning":
            results.setdefault(tuple(run.setting(name) for name in FIXED), []).append(run)
    tunings = [run for run in runs if run.setting("purpose") == "tuning"]
    return [_section(dict(zip(FIXED, key, strict=True)), results[key], tunings) for key in sorted(results, key=str)]


def _section(fixed: Mapping[str, object], runs: Sequence[Run], tunings: Sequence[Run]) -> Section:
    """One section from its runs and every tuning of the store."""
    grouped: dict[tuple, list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.setting("protocol"), run.label), []).append(run)
    arms, left_out = [], []
    for members in grouped.values():
        chosen = _most_repeated(members)
        kept = [run for run in members if run.variant == chosen]
        left_out += [run for run in members if run.variant != chosen]
        arms.append(_arm(kept, [run for run in tunings if _served(run, kept[0])]))
        if further := [run.continuation for run in kept if run.continuation]:
            arms.append(_arm(further))
    arms.sort(key=lambda arm: (PROTOCOLS.index(arm.protocol), place(arm)))
    return Section(fixed, tuple(arms), tuple(left_out))


def _arm(runs: Sequence[Run], tuning: Sequence[Run] = ()) -> Arm:
    by_seed = {run.seed: run for run in sorted(runs, key=lambda run: run.seed)}
    guide, width, protocol = (runs[0].setting(name) for name in ("guide", "width", "protocol"))
    return Arm(runs[0].label, guide, width, protocol, by_seed, tuple(tuning))


def _most_repeated(members: Sequence[Run]) -> str:
    """Of several ways of training in one arm, the one with most seeds, then the one run last."""
    by_variant: dict[str, list[str]] = {}
    for run in members:
        by_variant.setdefault(run.variant, []).append(str(pick(run.record, "provenance", "started")))
    return max(by_variant, key=lambda variant: (len(by_variant[variant]), max(by_variant[variant])))


def _served(tuning: Run, result: Run) -> bool:
    """Whether a tuning belongs to this result: all but their lengths, seeds and rates agree."""
    return all(tuning.setting(name) == result.setting(name) for name in (*FIXED, "protocol", "guide", "width"))
