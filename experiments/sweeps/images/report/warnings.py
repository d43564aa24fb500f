"""What keeps the numbers of a section from carrying a conclusion."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.reporting.document import Note, counted, listed
from experiments.reporting.statistics import paired_difference, significant
from experiments.sweeps.images.report.sections import BOUND, Arm, Section

#: A model whose best MSE is more than this share of the mean image's has collapsed: its latents hardly matter.
COLLAPSED = 0.9
#: The constant guide, which predicts one image for every row, is trained when its MSE is the mean image's up to this share.
MEAN_IMAGE = 0.02


def warnings(section: Section) -> list[Note]:
    """All of them, by title."""
    found = {
        "Incomplete": " ".join(_missing(section)),
        "Diverged": "; ".join(_diverged(section)),
        **{f"Not converged, {protocol}": _not_converged(section, protocol) for protocol in section.protocols},
        "Learning rates at the edge of those tried": "; ".join(_edges(section)),
        "Also in the store": listed(
            sorted({f"{run.label} ({run.setting('protocol')}) at {run.variant}" for run in section.left_out})
        ),
        **{f"Order of the guides, {protocol}": _order(section, protocol) for protocol in section.protocols},
        "Constant guide and mean image": _mean_image(section),
        "The model has collapsed": _collapse(section),
    }
    return [Note("warning", text if text.endswith(".") else f"{text}.", title) for title, text in found.items() if text]


def _missing(section: Section) -> Iterator[str]:
    """What the store does not hold, so that no silence passes for a result."""
    # One learning rate for all compares rates; the fair protocol alone is complete.
    gaps = ["the fair protocol"] if "fair" not in section.protocols else []
    for protocol in section.protocols:
        present = {arm.guide for arm in section.under(protocol)}
        words = {"constant": "the constant guide", "amortized": "an amortized guide", "factorized": "F-VI"}
        gaps += [f"{name} ({protocol})" for guide, name in words.items() if guide not in present]
    if gaps:
        yield f"No record of {listed(gaps)}."
    counts = {f"{arm.label} ({arm.protocol})": len(arm.runs) for arm in section.arms}
    if set(counts.values()) == {1}:
        yield "One seed: every error is the Monte Carlo error alone."
    elif len(set(counts.values())) > 1:
        each = listed([f"{name} {count}" for name, count in counts.items()])
        yield f"Unequal numbers of seeds: {each}. Gaps use the seeds that both guides have."


def _diverged(section: Section) -> Iterator[str]:
    for arm in section.arms:
        for run in arm.runs.values():
            if run.diverged:
                at = run.result("diverged_at")
                step = "" if at is None else f", at step {at:,}"
                yield f"{arm.label}, {arm.protocol}, seed {run.seed}{step}: left out of means, not there in times to a level"


def _not_converged(section: Section, protocol: str) -> str:
    def in_some(arm: Arm) -> str:
        some = len(arm.unfinished) < len(arm.done)
        return f" ({len(arm.unfinished)} of {counted(len(arm.done), 'seed')})" if some else ""

    return listed([f"{arm.label}{in_some(arm)}" for arm in section.under(protocol) if arm.unfinished])


def _edges(section: Section) -> Iterator[str]:
    """Tuned learning rates at the edge of all that were tried: a better one may lie beyond."""
    at_edge: dict[str, list[str]] = {}
    for arm in section.under("fair"):
        trials = [trial for run in arm.tuning for trial in run.result("trials")]
        for part in ("local", "global"):
            rates, rate = {trial[f"lr_{part}"] for trial in trials}, arm.first.setting(f"lr_{part}")
            if len(rates) > 1 and rate in (min(rates), max(rates)):
                side = "largest" if rate == max(rates) else "smallest"
                at_edge.setdefault(f"the {side} {part} rate, {rate:g}", []).append(arm.label)
    yield from (f"{listed(labels)} chose {rate}" for rate, labels in at_edge.items())


def _order(section: Section, protocol: str) -> str:
    """Where constant <= A-VI <= F-VI, which the nesting of the guides demands at convergence, does not hold."""
    bounds = {arm.label: arm.each(*BOUND) for arm in section.under(protocol)}
    pairs = [("F-VI", section.factorized(protocol), label) for label in bounds if not label.startswith("F-VI")]
    pairs += [(arm.label, bounds[arm.label], "constant") for arm in section.amortized(protocol) if "constant" in bounds]
    leads = [(outer, inner, paired_difference(bounds[inner], high)) for outer, high, inner in pairs]
    wrong = sorted((each for each in leads if each[2].sign > 0), key=lambda each: -each[2].value)
    most = {outer: f"{outer} below {inner} by {lead}" for outer, inner, lead in reversed(wrong)}
    return f"{'; '.join(most.values())} nats a row: a guide below one that it contains lacks training." if wrong else ""


def _mean_image(section: Section) -> str:
    target, wrong = section.mean_image("train"), []
    for protocol in section.protocols:
        arm = section.arm(protocol, "constant")
        excess = arm.mean("final", "train", "mse").value / target - 1 if arm and target > 0 else 0.0
        wrong += [f"{excess:+.1%} ({protocol})"] if abs(excess) > MEAN_IMAGE else []
    return f"The two MSEs should be equal; the constant guide's differs by {listed(wrong)}." if wrong else ""


def _collapse(section: Section) -> str:
    target = section.mean_image("train")
    errors = [(mean.value, arm) for arm in section.arms if (mean := arm.mean("final", "train", "mse")).known]
    best, arm = min(errors, key=lambda pair: pair[0], default=(0.0, None))
    if not best > COLLAPSED * target:
        return ""
    told = "not below" if best >= target else f"{1 - best / target:.0%} below"
    facts = f"{significant(best)} ({arm.label}, {arm.protocol}), is {told} the mean image's, {significant(target)}"
    return f"The lowest train MSE, {facts}: no guide can show a gap."
