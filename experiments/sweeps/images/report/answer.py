"""What opens the report: the order of the guides, what amortization costs, what it saves; or what is missing for that."""

from __future__ import annotations

from experiments.reporting.document import Note, counted, listed
from experiments.reporting.statistics import mean_over_seeds, paired_difference, ratio_text, significant
from experiments.sweeps.images.report.claims import Claim, compare
from experiments.sweeps.images.report.sections import BOUND, Arm, Section


def answer(section: Section) -> Note:
    """The answer of one section, from the fair protocol where the store has it."""
    protocol = section.protocols[-1]
    best, constant = section.best_amortized(protocol), section.arm(protocol, "constant")
    if best is None or not section.factorized(protocol):
        text = f"No seed of both F-VI and an amortized guide has finished under the {protocol} protocol."
        return Note("warning", text, section.title)
    _, race, final = compare(section, best)
    chain = f"F-VI ({final.factorized}) {'<' if final.gap.sign < 0 else '≥'} {best.label} ({final.amortized})"
    if constant is not None and constant.done:
        lead = paired_difference(best.each(*BOUND), constant.each(*BOUND))
        chain += f" {'<' if lead.sign < 0 else '≥'} constant ({constant.mean(*BOUND)})"
    still = _unfinished(section, [best, *([constant] if constant else [])])
    found = f"{chain} nats a row; {protocol} protocol, {counted(final.gap.seeds, 'seed')}."
    kind = "warning" if still or " < " in chain else "answer"
    return Note(kind, f"{found} {still or _cost(race, final)}", section.title)


def _unfinished(section: Section, arms: list[Arm]) -> str:
    """What the bounds of F-VI and of these still gained and at what cost, empty where all of them had converged."""
    protocol = arms[0].protocol
    runs = {"F-VI": [arm.runs[seed] for seed, arm in section.trained(protocol).items()]}
    runs |= {arm.label: list(arm.done.values()) for arm in arms}
    if any(run.converged is None for each in runs.values() for run in each):
        return "Whether these have converged is not recorded."
    said = []
    for label, each in runs.items():
        late = [run for run in each if run.converged is False]
        gain, seconds = (
            mean_over_seeds(run.measured("convergence", name) for run in late).value
            for name in ("late_gain", "late_seconds")
        )
        if late:
            said.append(f"{label} {'+' * (gain > 0)}{significant(gain, 2)} nats a row in {significant(seconds, 2)} s")
    return f"Not converged; the last half of the steps changed {listed(said)}." if said else ""


def _cost(race: Claim, final: Claim) -> str:
    """What amortization costs in nats a row, and what it saves in seconds."""
    cost = {
        1: f"Amortization costs {final.gap} nats a row",
        0: f"What amortization costs cannot be told from nothing, {final.gap} nats a row",
        -1: f"F-VI ends {abs(final.gap)} nats a row below A-VI, which it contains: it lacks training",
    }[final.gap.sign]
    slow, fast = race.slow, race.fast
    if slow is None or fast is None:
        return f"{cost}; what it saves is unknown, as F-VI from its own start is not in the store."
    verdict = "saves time" if slow.value > fast.value else "leaves the time open" if slow.censored else "saves no time"
    return (
        f"{cost}. It {verdict}: to A-VI's level A-VI takes {fast} s and F-VI {slow} s (ratio {ratio_text(slow, fast)})."
    )
