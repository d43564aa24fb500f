"""The sentence that opens the report: the order of the guides, what amortization costs, and what it saves."""

from __future__ import annotations

from experiments.reporting.document import Finding
from experiments.reporting.statistics import (
    Duration,
    Mean,
    mean_over_seeds,
    paired_difference,
    ratio_text,
    significant,
    with_error,
)
from experiments.sweeps.images.report.comparisons import Comparison, best_amortized
from experiments.sweeps.images.report.sections import Arm, Section
from experiments.sweeps.images.report.texts import counted, listed


def answered(section: Section) -> str:
    """The protocol that answers: fair where the store has it."""
    return section.protocols[-1]


def answer(section: Section) -> Finding:
    """The answer of one section, or what the store lacks for one."""
    protocol = answered(section)
    best = best_amortized(section, protocol)
    if best is None or not section.factorized(protocol):
        text = f"No seed of both F-VI and an amortized guide has finished under the {protocol} protocol."
        return Finding("warning", section.title, text)
    compared = Comparison(section, best)
    seeds = compared.final.gap.seeds
    chain = order(compared)
    parts = [f"{chain} nats a row; {protocol} protocol, {counted(seeds, 'seed')}."]
    still = unfinished(compared)
    parts += [still] if still else [cost(compared), saving(compared)]
    return Finding("warning" if still or " < " in chain else "result", section.title, " ".join(parts))


def order(compared: Comparison) -> str:
    """F-VI >= A-VI >= constant with their bounds, and < where the numbers turn it round."""
    section, best = compared.section, compared.amortized
    chain = f"F-VI ({with_error(compared.final.factorized)}) {'<' if compared.final.gap.sign < 0 else '≥'} "
    chain += f"{best.label} ({with_error(compared.final.amortized)})"
    constant = section.arm(compared.protocol, "constant")
    if constant is not None and constant.done:
        name = ("final", "train", "elbo")
        lead = paired_difference(best.each(*name), constant.each(*name))
        chain += f" {'<' if lead.sign < 0 else '≥'} constant ({with_error(constant.mean(*name))})"
    return chain


def unfinished(compared: Comparison) -> str:
    """What the bounds of the chain still gained and at what cost, empty where all of them had converged."""
    section, protocol = compared.section, compared.protocol
    runs = {"F-VI": [arm.cells[seed] for seed, arm in section.runs(protocol).items()]}
    arms = [compared.amortized, section.arm(protocol, "constant")]
    runs |= {arm.label: list(arm.done.values()) for arm in arms if arm}
    if any(cell.converged is None for cells in runs.values() for cell in cells):
        return "Whether these have converged is not recorded."
    said = []
    for label, cells in runs.items():
        cells = [cell for cell in cells if cell.converged is False]
        gained, seconds = (mean_over_seeds(cell.measured("convergence", name) for cell in cells)
                           for name in ("late_gain", "late_seconds"))  # fmt: skip
        if gained.known:
            verb, amount = "gained" if gained.value >= 0 else "lost", significant(abs(gained.value), 2)
            said.append(f"{label} {verb} {amount} nats a row in {significant(seconds.value, 2)} s")
        elif cells:
            said.append(f"{label} gained an unknown amount")
    return f"Not converged: in the last half of its steps {listed(said)}." if said else ""


def cost(compared: Comparison) -> str:
    """What amortization costs in nats a row."""
    gap = compared.final.gap
    amount = f"{with_error(Mean(abs(gap.value), gap.se, gap.seeds))} nats a row"
    if gap.sign < 0:
        return f"F-VI ends {amount} below A-VI, which it contains: that measures its training, not amortization."
    if all(arm.guide == "amortized" for arm in compared.section.starts(compared.protocol).values()):
        return "No training of F-VI found a bound above A-VI's, which it contains."
    if gap.sign == 0:
        return f"What amortization costs cannot be told from nothing: {with_error(gap)} nats a row."
    return f"Amortization costs {amount}."


def saving(compared: Comparison) -> str:
    """What amortization saves in seconds, and where F-VI had got to when A-VI's training ended."""
    slow, fast = compared.times("seconds")
    if slow is None or fast is None:
        return "What it saves is unknown: F-VI from its own start is not in the store."
    if slow.censored:
        told = f"To A-VI's level A-VI takes {lasting(fast)}; F-VI does not get there in {significant(slow.value)} s."
    else:
        verdict = "saves time" if slow.value > fast.value else "saves no time"
        told = f"It {verdict}: to A-VI's level A-VI takes {lasting(fast)} and F-VI {lasting(slow)} "
        told += f"(ratio {ratio_text(slow, fast)})."
    equal = compared.equal("seconds")
    if not equal.gap.known:
        return told
    side = "below" if equal.gap.value < 0 else "above"
    amount = with_error(Mean(abs(equal.gap.value), equal.gap.se, equal.gap.seeds))
    ended = compared.amortized.trained.value
    return f"{told} In the {significant(ended)} s that A-VI took, F-VI got to {amount} nats a row {side} it."


def lasting(duration: Duration) -> str:
    return f"{'more than ' if duration.censored else ''}{significant(duration.value)} s"


def starts_used(section: Section, protocol: str) -> str:
    """Which start F-VI's bound comes from, in how many seeds each."""
    labels = [_start(arm) for arm in section.starts(protocol).values()]
    return listed([f"{label} in {counted(labels.count(label), 'seed')}" for label in dict.fromkeys(labels)])


def _start(arm: Arm) -> str:
    if arm.guide == "factorized":
        return "its own start"
    return f"A-VI k={arm.width} itself" if arm.guide == "amortized" else f"the outputs of A-VI k={arm.width}"
