"""The records of the images sweep in order: the runs of one guide, the guides that compare, under each protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.reporting.records import pick
from experiments.reporting.statistics import Mean, mean_over_seeds, paired_difference
from experiments.sweeps.images.report.runs import Run

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
    """The runs of one guide under one protocol, by seed, and the tunings of its learning rates."""

    runs: Mapping[int, Run]
    tunings: Sequence[Run] = ()

    @property
    def first(self) -> Run:
        return next(iter((self.done or self.runs).values()))

    @property
    def label(self) -> str:
        return self.first.label

    @property
    def guide(self) -> str:
        return self.first.setting("guide")

    @property
    def width(self) -> int | None:
        return self.first.setting("width")

    @property
    def place(self) -> tuple[int, int]:
        return GUIDES.index(self.guide), self.width or 0

    @property
    def done(self) -> dict[int, Run]:
        return {seed: run for seed, run in self.runs.items() if not run.diverged}

    def each(self, *path: str) -> dict[int, Mean]:
        """The number at `path` of every result that did not diverge, by seed."""
        return {seed: run.mean(*path) for seed, run in self.done.items()}

    def mean(self, *path: str) -> Mean:
        return mean_over_seeds(self.each(*path).values())


@dataclass(frozen=True, eq=False)
class Comparison:
    """The guides of a section under one protocol, by label. F-VI's bound is by seed the best of all that it contains."""

    protocol: str
    arms: Mapping[str, Arm]

    def of(self, *guides: str) -> list[Arm]:
        return [arm for arm in self.arms.values() if arm.guide in guides]

    def best(self, *, least: int = 1) -> Arm | None:
        """The amortized guide of at least this width, failing that the widest, with the highest final training bound."""
        arms = [arm for arm in self.of("amortized") if arm.mean(*BOUND).known]
        eligible = [arm for arm in arms if arm.width >= least] or arms[-1:]
        return max(eligible, key=lambda arm: arm.mean(*BOUND).value, default=None)

    @cached_property
    def trained(self) -> dict[int, Arm]:
        """By seed, the F-VI that was trained to the highest bound: from its own start, or from an encoder's outputs."""
        return _highest(self.of("factorized", "continued"))

    @cached_property
    def starts(self) -> dict[int, Arm]:
        """By seed, the arm that F-VI's bound comes from: such a run or, of the fair protocol, A-VI, which it contains."""
        if not self.trained or self.protocol != "fair":
            return self.trained
        return _highest([*dict.fromkeys(self.trained.values()), *self.of("amortized")])

    @property
    def bound(self) -> dict[int, Mean]:
        """F-VI's final training bound by seed."""
        return {seed: arm.each(*BOUND)[seed] for seed, arm in self.starts.items()}

    def joint_gap(self, arm: Arm) -> Mean | None:
        """F-VI's bound minus the arm's, paired by seed; None of the F-VI that gives the bound in every seed."""
        if arm.guide in ("factorized", "continued") and set(self.starts.values()) == {arm}:
            return None
        return paired_difference(self.bound, arm.each(*BOUND))


@dataclass(frozen=True)
class Section:
    """One data set, architecture, noise and sizes, by protocol."""

    settings: Mapping[str, object]
    comparisons: Sequence[Comparison]
    left_out: Sequence[Run]  # trained in another way than those their arm reports

    @property
    def data(self) -> str:
        return TITLES.get(self.settings["dataset"], self.settings["dataset"])

    @property
    def title(self) -> str:
        fixed = self.settings
        return f"{self.data}, {fixed['architecture']} decoder, {fixed['noise']} noise, {fixed['latent_dim']} latents"

    @property
    def arms(self) -> list[tuple[Comparison, Arm]]:
        return [(comparison, arm) for comparison in self.comparisons for arm in comparison.arms.values()]


def _highest(arms: Iterable[Arm]) -> dict[int, Arm]:
    """By seed, the arm with the highest final training bound."""
    found: dict[int, list[tuple[float, Arm]]] = {}
    for arm in arms:
        for seed, bound in arm.each(*BOUND).items():
            if bound.known:
                found.setdefault(seed, []).append((bound.value, arm))
    return {seed: max(found[seed], key=lambda each: each[0])[1] for seed in sorted(found)}


def read(records: Mapping[str, Mapping]) -> list[Section]:
    """The records sorted into sections: results into arms, tuning beside the fair arms that it served."""
    runs = [Run.read(record) for _, record in sorted(records.items())]
    tunings = [run for run in runs if run.setting("purpose") == "tuning"]
    sections: dict[tuple, dict[str, dict[str, list[Run]]]] = {}
    for run in (run for run in runs if run.setting("purpose") != "tuning"):
        comparisons = sections.setdefault(tuple(run.setting(name) for name in FIXED), {})
        comparisons.setdefault(run.setting("protocol"), {}).setdefault(run.label, []).append(run)
    return [_section(key, sections[key], tunings) for key in sorted(sections, key=str)]


def _section(key: tuple, found: Mapping[str, Mapping[str, Sequence[Run]]], tunings: Sequence[Run]) -> Section:
    """One section from its runs, by protocol and label, and every tuning of the store."""
    comparisons, left_out = [], []
    for protocol in sorted(found, key=PROTOCOLS.index):
        arms = []
        for members in found[protocol].values():
            kept = _most_repeated(members)
            left_out += [run for run in members if run not in kept]
            # All but their lengths, seeds and rates agree.
            same = (*FIXED, "protocol", "guide", "width")
            served = [each for each in tunings if all(each.setting(name) == kept[0].setting(name) for name in same)]
            further = [run.continuation for run in kept if run.continuation]
            arms += [_arm(runs, tunings) for runs, tunings in ((kept, served), (further, ())) if runs]
        arms.sort(key=lambda arm: arm.place)
        comparisons.append(Comparison(protocol, {arm.label: arm for arm in arms}))
    return Section(dict(zip(FIXED, key, strict=True)), comparisons, left_out)


def _arm(runs: Sequence[Run], tunings: Sequence[Run]) -> Arm:
    by_seed = {int(run.setting("seed")): run for run in runs}
    return Arm({seed: by_seed[seed] for seed in sorted(by_seed)}, tunings)


def _most_repeated(members: Sequence[Run]) -> list[Run]:
    """Of several ways of training in one arm, the one with most seeds, then the one run last."""
    variants: dict[str, list[Run]] = {}
    for run in members:
        variants.setdefault(run.variant, []).append(run)
    started = {name: max(pick(run.record, "provenance", "started") for run in runs) for name, runs in variants.items()}
    return variants[max(variants, key=lambda name: (len(variants[name]), started[name]))]
