"""Whether the numbers of a section can carry a conclusion: warnings, and in one line the checks that held."""

from __future__ import annotations

import math
from collections.abc import Iterator

from experiments.reporting.document import Finding
from experiments.reporting.statistics import paired_difference, significant, with_error
from experiments.sweeps.images.report.answer import starts_used
from experiments.sweeps.images.report.sections import TOLERANCES, Arm, Section
from experiments.sweeps.images.report.texts import counted, listed

#: A model whose best MSE is more than this share of the mean image's has collapsed: its latents hardly matter.
COLLAPSED = 0.9
#: The constant guide's MSE may differ from the mean image's by this share before the check fails.
MEAN_IMAGE = 0.02


def findings(section: Section) -> list[Finding]:
    """Every sentence about one section: what qualifies its numbers, where F-VI's bound comes from, what was checked."""
    found = [finding for about in ABOUT for finding in about(section)]
    if any(arm.guide != "factorized" for arm in section.starts("fair").values()):
        text = f"By seed the best of all that F-VI contains: {starts_used(section, 'fair')}."
        found.append(Finding("result", "F-VI's bound, fair", text))
    held = [finding.text for finding in found if finding.kind == "check"]
    found = [finding for finding in found if finding.kind != "check"]
    return [*found, Finding("check", "Checked", " ".join(held))] if held else found


def missing(section: Section) -> Iterator[Finding]:
    """What the store does not hold, so that no silence passes for a result."""
    # One learning rate for all compares rates; the fair protocol alone is complete.
    gaps = ["the fair protocol"] if "fair" not in section.protocols else []
    for protocol in section.protocols:
        present = {arm.guide for arm in section.under(protocol)}
        words = {"constant": "the constant guide", "amortized": "an amortized guide", "factorized": "F-VI"}
        gaps += [f"{name} ({protocol})" for guide, name in words.items() if guide not in present]
    parts = [f"No record of {listed(gaps)}."] if gaps else []
    counts = {len(arm.cells) for arm in section.arms}
    if counts == {1}:
        parts.append("One seed: every error is the Monte Carlo error alone.")
    elif len(counts) > 1:
        each = listed([f"{arm.label} ({arm.protocol}) {len(arm.cells)}" for arm in section.arms])
        parts.append(f"Unequal numbers of seeds: {each}. Gaps use the seeds that both guides have.")
    if parts:
        yield Finding("warning", "Incomplete", " ".join(parts))


def diverged(section: Section) -> Iterator[Finding]:
    """The cells that diverged, each by name."""
    broken = []
    for arm in section.arms:
        for cell in arm.cells.values():
            if cell.diverged:
                at = cell.result("diverged_at")
                step = "an unknown step" if at is None else f"step {at:,}"
                broken.append(f"{cell.label}, {arm.protocol}, seed {cell.seed}, at {step}")
    if broken:
        yield Finding("warning", "Diverged", f"{'; '.join(broken)}. Left out of means; not there in times to a level.")


def other_variants(section: Section) -> Iterator[Finding]:
    """Results of another length or other learning rates, which the section does not show."""
    if section.left_out:
        cells = {f"{cell.label} ({cell.setting('protocol')}) at {cell.variant}" for cell in section.left_out}
        text = f"{listed(sorted(cells))}. Shown is what has most seeds, of equals what ran last."
        yield Finding("warning", "Also in the store", text)


def not_converged(section: Section) -> Iterator[Finding]:
    """Guides that stopped before their bound stood still; the table says what it still gained."""
    for protocol in section.protocols:
        arms = [f"{arm.label}{_in_some(arm)}" for arm in section.under(protocol) if arm.unfinished]
        if arms:
            yield Finding("warning", f"Not converged, {protocol}", f"{listed(arms)}.")


def _in_some(arm: Arm) -> str:
    some = len(arm.unfinished) < len(arm.done)
    return f" ({len(arm.unfinished)} of {counted(len(arm.done), 'seed')})" if some else ""


def edges(section: Section) -> Iterator[Finding]:
    """Tuned learning rates at the edge of all that were tried: a better one may lie beyond."""
    at_edge: dict[str, list[str]] = {}
    for arm in section.under("fair"):
        tried = [trial.rates for cell in arm.tuning for trial in cell.trials]
        for part, rate, rates in zip(("local", "global"), arm.first.rates, zip(*tried, strict=True), strict=False):
            if len(set(rates)) > 1 and rate in (min(rates), max(rates)):
                side = "largest" if rate == max(rates) else "smallest"
                at_edge.setdefault(f"the {side} {part} rate, {rate:g}", []).append(arm.label)
    if at_edge:
        text = "; ".join(f"{listed(labels)} chose {rate}" for rate, labels in at_edge.items())
        yield Finding("warning", "Learning rates at the edge of those tried", f"{text}.")


def meaningless(section: Section) -> Iterator[Finding]:
    """Published tolerances that the mean image already meets."""
    passed = [f"{level:g}" for level in TOLERANCES if not section.tells(level)]
    if passed:
        mean = significant(section.mean_image("train"))
        text = f"The mean image's train MSE, {mean}, already meets the published tolerance {listed(passed)}."
        yield Finding("warning", "A tolerance without meaning", text)


def nesting(section: Section) -> Iterator[Finding]:
    """constant <= A-VI <= F-VI, which the nesting of the guides demands at convergence."""
    for protocol in section.protocols:
        bounds = {arm.label: arm.each("final", "train", "elbo") for arm in section.under(protocol)}
        nested = [("F-VI", section.factorized(protocol), label, bounds[label])
                  for label in bounds if not label.startswith("F-VI")]  # fmt: skip
        nested += [(arm.label, bounds[arm.label], "constant", bounds["constant"])
                   for arm in section.amortized(protocol) if "constant" in bounds]  # fmt: skip
        leads = [(outer, inner, paired_difference(low, high)) for outer, high, inner, low in nested]
        below: dict[str, list[str]] = {}
        for outer, inner, lead in leads:
            if lead.sign > 0:
                below.setdefault(outer, []).append(f"{inner} ({with_error(lead)})")
        wrong = [f"{outer} below {listed(inner)}" for outer, inner in below.items()]
        if wrong:
            text = f"Nats a row: {'; '.join(wrong)}. What keeps a guide below one that it contains is its training."
            yield Finding("warning", f"Order of the guides, {protocol}", text)
        elif any(lead.known for *_, lead in leads):
            yield Finding("check", "", f"constant ≤ A-VI ≤ F-VI holds within the errors ({protocol}).")


def mean_image(section: Section) -> Iterator[Finding]:
    """The known answer: the constant guide can only predict one image for every row, at best the mean image."""
    target = section.mean_image("train")
    constants = {protocol: section.arm(protocol, "constant") for protocol in section.protocols}
    errors = {p: arm.mean("final", "train", "mse").value / target for p, arm in constants.items() if arm and target > 0}
    excess = {protocol: round(ratio - 1, 4) + 0.0 for protocol, ratio in errors.items() if math.isfinite(ratio)}
    for wrong in (False, True):
        told = [f"{value:+.1%} ({p})" for p, value in excess.items() if (abs(value) > MEAN_IMAGE) is wrong]
        if told and wrong:
            text = f"The two MSEs should be equal; the constant guide's differs by {listed(told)}."
            yield Finding("warning", "Constant guide and mean image", text)
        elif told:
            yield Finding("check", "", f"The constant guide's train MSE is the mean image's: {listed(told)}.")


def collapse(section: Section) -> Iterator[Finding]:
    """Whether any guide's reconstruction beats the mean image by more than a little."""
    target = section.mean_image("train")
    errors = [(mean.value, arm) for arm in section.arms if (mean := arm.mean("final", "train", "mse")).known]
    if not errors or not target > 0:
        return
    best, arm = min(errors, key=lambda pair: pair[0])
    facts = f"The lowest train MSE, {significant(best)} ({arm.label}, {arm.protocol}), is "
    if best >= target:
        facts += f"not below the mean image's, {significant(target)}"
    else:
        facts += f"{1 - best / target:.0%} below the mean image's, {significant(target)}"
    if best > COLLAPSED * target:
        yield Finding("warning", "The model has collapsed", f"{facts}: no guide can show a gap.")
    else:
        yield Finding("check", "", f"{facts}.")


ABOUT = (missing, diverged, not_converged, edges, other_variants, meaningless, nesting, mean_image, collapse)
