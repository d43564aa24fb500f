"""The records of the images sweep in order: the runs of one guide, the guides that compare, under each protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

    label: str
    guide: str
    width: int | None
    protocol: str
    runs: Mapping[int, Run]
    tunings: Sequence[Run] = ()

    @cached_property
    def done(self) -> dict[int, Run]:
        return {seed: run for seed, run in self.runs.items() if not run.diverged}

    def each(self, *path: str) -> dict[int, Mean]:
        """The number at `path` of every result that did not diverge, by seed."""
        return {seed: run.mean(*path) for seed, run in self.done.items()}

    def mean(self, *path: str) -> Mean:
        return mean_over_seeds(self.each(*path).values())

    def average(self, of: Callable[[Run], float]) -> float:
        return mean_over_seeds(Mean(of(run), 0.0, 1) for run in self.done.values()).value


@dataclass(frozen=True, eq=False)
class Comparison:
    """The guides of a section under one protocol, by label. F-VI's bound is by seed the best of all that it contains."""

    protocol: str
    arms: Mapping[str, Arm]

    def arm(self, label: str) -> Arm:
        """The guide of this name, without runs if there is none."""
        return self.arms.get(label) or Arm(label, "", None, self.protocol, {})

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

    @cached_property
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
    def arms(self) -> list[Arm]:
        return [arm for comparison in self.comparisons for arm in comparison.arms.values()]


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
    sections: dict[tuple, dict[tuple, list[Run]]] = {}
    for run in (run for run in runs if run.setting("purpose") != "tuning"):
        key = tuple(run.setting(name) for name in FIXED)
        sections.setdefault(key, {}).setdefault((run.setting("protocol"), run.label), []).append(run)
    return [_section(key, list(sections[key].values()), tunings) for key in sorted(sections, key=str)]


def _section(key: tuple, groups: Sequence[Sequence[Run]], tunings: Sequence[Run]) -> Section:
    """One section from the runs of each guide and protocol, and every tuning of the store."""
    arms: list[Arm] = []
    for members in groups:
        kept = _most_repeated(members)
        # All but their lengths, seeds and rates agree.
        same = (*FIXED, "protocol", "guide", "width")
        served = [each for each in tunings if all(each.setting(name) == kept[0].setting(name) for name in same)]
        arms.append(_arm(kept, served))
        if further := [run.continuation for run in kept if run.continuation]:
            arms.append(_arm(further, ()))
    arms.sort(key=lambda arm: (GUIDES.index(arm.guide), arm.width or 0))
    under = {protocol: {arm.label: arm for arm in arms if arm.protocol == protocol} for protocol in PROTOCOLS}
    comparisons = [Comparison(protocol, found) for protocol, found in under.items() if found]
    left_out = [run for members in groups for run in members if run not in _most_repeated(members)]
    return Section(dict(zip(FIXED, key, strict=True)), comparisons, left_out)


def _arm(runs: Sequence[Run], tunings: Sequence[Run]) -> Arm:
    by_seed = {int(run.setting("seed")): run for run in runs}
    named = (runs[0].setting(name) for name in ("guide", "width", "protocol"))
    return Arm(runs[0].label, *named, {seed: by_seed[seed] for seed in sorted(by_seed)}, tunings)


def _most_repeated(members: Sequence[Run]) -> list[Run]:
    """Of several ways of training in one arm, the one with most seeds, then the one run last."""
    variants: dict[str, list[Run]] = {}
    for run in members:
        variants.setdefault(run.variant, []).append(run)
    return max(
        variants.values(), key=lambda runs: (len(runs), max(pick(run.record, "provenance", "started") for run in runs))
    )
