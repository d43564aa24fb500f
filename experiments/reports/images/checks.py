"""Whether the numbers of a section can carry a conclusion: what is missing, known answers, unfinished training."""

from __future__ import annotations

import math

import numpy as np

from experiments.document import Finding
from experiments.reports.images.cells import PROTOCOLS, TOLERANCES, Section
from experiments.reports.images.records import CellRecord
from experiments.reports.images.words import listed
from experiments.summary import Mean, paired_difference, significant, with_error

#: A model whose best MSE is more than this share of the mean image's has collapsed: its latents hardly matter.
COLLAPSED = 0.9
#: The constant guide's MSE may differ from the mean image's by this share before the check fails.
MEAN_IMAGE = 0.02
#: A guide still moves when the last tenth of its steps brought more than this share of the section's span.
MOVING = 0.01


def missing(section: Section) -> list[Finding]:
    """What the store does not hold, so that no silence passes for a result."""
    gaps = [f"no record of the {protocol} protocol" for protocol in PROTOCOLS if protocol not in section.protocols]
    for protocol in section.protocols:
        present = {arm.guide for arm in section.under(protocol)}
        for guide, words in (
            ("constant", "the constant guide"),
            ("amortized", "an amortized guide"),
            ("factorized", "F-VI"),
        ):
            if guide not in present:
                gaps.append(f"no record of {words} under the {protocol} protocol")
    found = []
    if gaps:
        found.append(
            Finding("warning", "Incomplete", f"The store holds {listed(gaps)}; what depends on it is left out here.")
        )
    counts = {len(arm.cells) for arm in section.arms}
    if counts == {1}:
        text = "Every standard error is the Monte Carlo error alone; how much seeds differ is unknown."
        found.append(Finding("warning", "One seed", text))
    elif len(counts) > 1:
        each = listed([f"{arm.label} ({arm.protocol}) {len(arm.cells)}" for arm in section.arms])
        text = f"Seeds a guide: {each}. Gaps use the seeds that both guides have."
        found.append(Finding("warning", "Unequal numbers of seeds", text))
    return found


def diverged(section: Section) -> list[Finding]:
    """The cells that diverged, each by name."""
    broken = [
        f"{cell.label}, {cell.setting('protocol')}, seed {cell.seed}, at step {number_or_unknown(cell)}"
        for arm in section.arms for cell in arm.cells.values() if cell.diverged
    ]  # fmt: skip
    if not broken:
        return []
    text = f"{'; '.join(broken)}. Left out of every mean, and counted as not there in the times to a level."
    return [Finding("warning", "Diverged", text)]


def number_or_unknown(cell: CellRecord) -> str:
    step = cell.result("diverged_at")
    return "unknown" if step is None else f"{step:,}"


def other_rates(section: Section) -> list[Finding]:
    """Results at learning rates that the section does not show."""
    if not section.left_out:
        return []
    cells = {
        f"{cell.label} ({cell.setting('protocol')}) at {cell.rates[0]:g} / {cell.rates[1]:g}"
        for cell in section.left_out
    }
    text = (
        f"Also in the store and not shown: {listed(sorted(cells))}. Of several pairs of learning rates, the one with "
        "most seeds is shown, of equals the one run last."
    )
    return [Finding("warning", "More than one pair of learning rates", text)]


def mean_image(section: Section) -> list[Finding]:
    """The known answer: the constant guide can only predict one image for every row, at best the mean image."""
    found = []
    target = section.mean_image("train")
    for protocol in section.protocols:
        arm = section.arm(protocol, "constant")
        if arm is None or not arm.mean("final", "train", "mse").known or not target > 0:
            continue
        measured = arm.mean("final", "train", "mse")
        excess = round(measured.value / target - 1, 4) + 0.0
        holds = abs(excess) <= MEAN_IMAGE
        verdict = (
            "as it must be" if holds else "they should be equal, so its training has not ended or something is wrong"
        )
        values = f"{with_error(measured)}, the mean image's {significant(target)} ({excess:+.1%})"
        text = f"The constant guide's train MSE is {values}: {verdict}."
        found.append(
            Finding(
                "check" if holds else "warning",
                f"Constant guide = mean image, {protocol}",
                text,
                section.column(protocol),
            )
        )
    return found


def nesting(section: Section) -> list[Finding]:
    """constant <= A-VI <= F-VI, which the nesting of the guides demands at convergence."""
    found = []
    for protocol in section.protocols:
        compared, above, below = 0, [], []
        constant, factorized = section.arm(protocol, "constant"), section.arm(protocol, "F-VI")
        for arm in [constant, *section.amortized(protocol)] if constant else section.amortized(protocol):
            lead = over(section, arm.label, "F-VI", protocol) if factorized else None
            compared += bool(lead and lead.known)
            if lead and lead.known and lead.sign > 0:
                above.append(f"{arm.label} by {with_error(lead)}")
            lead = over(section, "constant", arm.label, protocol) if constant and arm is not constant else None
            if lead and lead.known and lead.sign > 0:
                below.append(f"{arm.label} by {with_error(lead)}")
        if above:
            text = (
                f"Above F-VI's ELBO: {listed(above)} nats a row. F-VI's family contains every solution of theirs, so "
                "at convergence F-VI is at least as high. These joint gaps measure F-VI's training, not amortization."
            )
            found.append(Finding("warning", f"F-VI has not converged, {protocol}", text, section.column(protocol)))
        if below:
            text = f"Below the constant guide's ELBO, which every encoder can express: {listed(below)} nats a row."
            found.append(Finding("warning", f"A-VI has not converged, {protocol}", text, section.column(protocol)))
        if compared and not above and not below:
            text = "No ELBO violates constant ≤ A-VI ≤ F-VI by more than the errors."
            found.append(Finding("check", f"Order of the guides, {protocol}", text, section.column(protocol)))
    return found


def over(section: Section, higher: str, lower: str, protocol: str) -> Mean:
    """By how much one guide's final training ELBO exceeds another's, paired by seed."""
    pair = (section.arm(protocol, label).each("final", "train", "elbo") for label in (higher, lower))
    return paired_difference(*pair)


def still_rising(section: Section) -> list[Finding]:
    """Guides whose training has not ended."""
    found = []
    for protocol in section.protocols if section.span else ():
        still = []
        for arm in section.under(protocol):
            rises = [late_rise(cell.curve) for cell in arm.done.values()]
            rises = [rise for rise in rises if math.isfinite(rise)]
            if rises and np.mean(rises) > MOVING * (section.span[1] - section.span[0]):
                still.append(f"{arm.label} by {significant(float(np.mean(rises)), 2)}")
        if still:
            text = (
                f"In the last tenth of the steps, or since the evaluation before it, the ELBO rose: {listed(still)} "
                "nats a row."
            )
            found.append(Finding("warning", f"Still rising, {protocol}", text, section.column(protocol)))
    return found


def late_rise(curve: dict[str, np.ndarray]) -> float:
    """What the last tenth of the steps added to the ELBO, nan where no evaluation lies before it."""
    steps, elbo = curve["step"], curve["elbo"]
    before = np.flatnonzero(steps <= 0.9 * steps[-1]) if len(steps) else np.array([])
    return float(elbo[-1] - elbo[before[-1]]) if len(before) else math.nan


def collapse(section: Section) -> list[Finding]:
    """Whether any guide's reconstruction beats the mean image by more than a little."""
    target = section.mean_image("train")
    errors = [(arm.mean("final", "train", "mse").value, arm) for arm in section.arms]
    errors = [(error, arm) for error, arm in errors if math.isfinite(error)]
    if not errors or not target > 0:
        return []
    best, arm = min(errors, key=lambda pair: pair[0])
    facts = (
        f"The lowest train MSE, {significant(best)} ({arm.label}, {arm.protocol}), is {1 - best / target:.0%} below "
        f"the mean image's {significant(target)}"
    )
    if best > COLLAPSED * target:
        text = f"{facts}: the local latents hardly matter, and no guide can show a gap."
        return [Finding("warning", "The model has collapsed", text)]
    return [Finding("check", "No collapse", f"{facts}: the local latents carry information.")]


def meaningless(section: Section) -> list[Finding]:
    """Published tolerances that the mean image already meets."""
    passed = [f"{level:g}" for level in TOLERANCES if not section.tells(level)]
    if not passed:
        return []
    text = (
        f"The mean image alone has a train MSE of {significant(section.mean_image('train'))}, so the published "
        f"tolerance {listed(passed)} says nothing here; no time to it is reported."
    )
    return [Finding("warning", "A tolerance without meaning", text)]
