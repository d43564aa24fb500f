"""What the numbers of the images sweep say about the claims, in sentences that are made from the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.document import Finding
from experiments.reports.images import checks
from experiments.reports.images.cells import ELBO_SHARE, Arm, Section
from experiments.reports.images.tables import speed
from experiments.reports.images.words import listed
from experiments.summary import SEEN, Mean, median_duration, paired_difference, ratio_text, significant, with_error

#: The claim to check speaks of encoders at least this wide, and of a speed-up of this many times.
WIDE, CLAIMED = 64, "2 to 3"


def findings(section: Section) -> list[Finding]:
    """Every sentence about one section: warnings, since they qualify the rest, then results, then checks that held."""
    limits = [
        checks.missing,
        checks.diverged,
        checks.other_rates,
        checks.mean_image,
        checks.nesting,
        checks.still_rising,
    ]
    limits += [checks.collapse, checks.meaningless]
    claims = [reach, times, ranking, amortization, held_out, tuning]
    found = [finding for about in limits + claims for finding in about(section)]
    return sorted(found, key=lambda finding: ("warning", "result", "check").index(finding.kind))


def wide(section: Section, protocol: str) -> list[Arm]:
    """The amortized guides that the claim speaks of; failing those, the widest there is."""
    arms = section.amortized(protocol)
    return [arm for arm in arms if arm.width >= WIDE] or arms[-1:]


def reach(section: Section) -> list[Finding]:
    """Whether wide encoders reach F-VI's ELBO and MSE."""
    found = []
    for protocol in section.protocols:
        arms = wide(section, protocol)
        if section.arm(protocol, "F-VI") is None or not arms:
            continue
        parts = []
        for arm in arms:
            gap = section.joint_gap(arm, "final", "train", "elbo")
            if gap.known:
                error = mse_compared(section.joint_gap(arm, "final", "train", "mse"), section, protocol)
                parts.append(f"{arm.label} {compared(gap, section)}; its train MSE is {error}.")
        if arms[0].width < WIDE:
            parts.append(f"No encoder of width {WIDE} or more is in the store; the widest stands in.")
        found.append(
            Finding(
                "result",
                f"A-VI against F-VI, {protocol}",
                " ".join(parts) or "No seed of both guides finished.",
                section.column(protocol),
            )
        )
    return found


def compared(gap: Mean, section: Section) -> str:
    """A joint gap in words, with its share of what separates the constant guide from the best."""
    details = [f"{gap.seeds} paired seed{'s' if gap.seeds > 1 else ''}"]
    if section.span:
        share = abs(gap.value) / (section.span[1] - section.span[0])
        details.append(f"{share:.1%} of the span from the constant to the best guide")
    amount = f"{with_error(Mean(abs(gap.value), gap.se, gap.seeds))} nats a row ({', '.join(details)})"
    if gap.sign == 0:
        side = "below" if gap.value > 0 else "above"
        return f"cannot be told from F-VI: its ELBO ends {amount} {side}, less than {SEEN:g} standard errors"
    return f"{'falls short of' if gap.sign > 0 else 'ends above'} F-VI's ELBO by {amount}"


def mse_compared(error: Mean, section: Section, protocol: str) -> str:
    theirs = section.arm(protocol, "F-VI").mean("final", "train", "mse").value
    if not error.known or not theirs > 0:
        return "not recorded"
    if error.sign == 0 and error.seeds > 1:
        difference = with_error(Mean(-error.value, error.se, error.seeds))
        return f"not to be told from F-VI's {significant(theirs)} (difference {difference})"
    return f"{abs(error.value / theirs):.1%} {'below' if error.value > 0 else 'above'} F-VI's {significant(theirs)}"


def times(section: Section) -> list[Finding]:
    """By how many times fewer steps and seconds than F-VI the amortized guides get there."""
    pairs = ((criterion, protocol) for criterion in section.criteria for protocol in section.protocols)
    found = [speed_to(section, protocol, *criterion) for criterion, protocol in pairs]
    return [finding for finding in found if finding is not None]


def speed_to(section: Section, protocol: str, title: str, name: str, level: float) -> Finding | None:
    """The medians and their ratios to one level under one protocol; None without F-VI or an encoder."""
    factorized = section.arm(protocol, "F-VI")
    theirs = factorized.passages(name, level) if factorized else []
    slow_steps, slow_seconds = (median_duration(theirs, unit) for unit in ("step", "seconds"))
    arms = [arm for arm in wide(section, protocol) if arm.passages(name, level)]
    if slow_steps is None or not arms:
        return None
    parts = [f"F-VI needs {spoken(slow_steps)} steps and {spoken(slow_seconds)} s."]
    for arm in arms:
        steps, seconds = (median_duration(arm.passages(name, level), unit) for unit in ("step", "seconds"))
        took = f"{arm.label} needs {spoken(steps)} steps and {spoken(seconds)} s"
        if steps.censored and slow_steps.censored:
            parts.append(f"{took}: neither got there, so nothing follows.")
        else:
            ratios = (spoken(ratio_text(*pair)) for pair in ((slow_steps, steps), (slow_seconds, seconds)))
            parts.append("{}: F-VI / A-VI is {} in steps, {} in seconds.".format(took, *ratios))
    grid = max(passage.resolution for arm in [factorized, *arms] for passage in arm.passages(name, level))
    parts.append(f"Claimed: {CLAIMED}. Medians over seeds, read off evaluations up to {grid:,.0f} steps apart.")
    return Finding("result", f"Time to {title}, {protocol}", " ".join(parts), section.column(protocol))


def spoken(bound: object) -> str:
    """A number that may be a bound, inside a sentence.

    >>> spoken("> 3.0"), spoken("2.0")
    ('more than 3.0', '2.0')
    """
    return str(bound).replace("> ", "more than ").replace("< ", "less than ")


def ranking(section: Section) -> list[Finding]:
    """Whether tuning changes who is ahead."""
    if len(section.protocols) < 2:
        return []
    scores = [
        {arm.label: arm.mean("final", "train", "elbo") for arm in section.under(protocol)}
        for protocol in section.protocols
    ]
    common = [label for label in section.labels if all(label in score and score[label].known for score in scores)]
    if len(common) < 2:
        return []
    one, other = (sorted(common, key=lambda label: -score[label].value) for score in scores)
    if one == other:
        return [Finding("result", "The protocols rank alike", f"By final ELBO under both: {' > '.join(one)}.")]
    swapped = [
        f"{a} with {b}" for place, a in enumerate(one) for b in one[place + 1 :]
        if other.index(a) > other.index(b)
        and all(checks.over(section, a, b, protocol).sign for protocol in section.protocols)
    ]  # fmt: skip
    orders = "; ".join(f"{p} {' > '.join(order)}" for p, order in zip(section.protocols, (one, other), strict=True))
    if not swapped:
        text = f"By final ELBO: {orders}. Those that change places do not differ by more than the errors."
        return [Finding("result", "The protocols rank alike within the errors", text)]
    text = f"By final ELBO: {orders}. By more than the errors change places: {listed(swapped)}."
    return [Finding("result", "The ranking depends on the protocol", text)]


def amortization(section: Section) -> list[Finding]:
    """What refinement of each row gains over the encoder's output."""
    found = []
    for protocol in section.protocols:
        parts = []
        for arm in section.amortized(protocol):
            train, test = (arm.mean("refined", rows, "gain") for rows in ("train", "test"))
            extra = paired_difference(arm.each("refined", "test", "gain"), arm.each("refined", "train", "gain"))
            if train.known and test.known:
                parts.append(
                    f"{arm.label} {with_error(train)} on training rows and {with_error(test)} on test rows "
                    f"(difference {with_error(extra)})"
                )
        if parts:
            text = (
                f"Nats a row: {'; '.join(parts)}. The difference is the generalization gap. Each is a lower bound, as "
                "refinement may stop early."
            )
            found.append(Finding("result", f"Amortization gap, {protocol}", text, section.column(protocol)))
    return found


def held_out(section: Section) -> list[Finding]:
    """Where each guide's posterior of a test row comes from."""
    sources: dict[str, list[str]] = {}
    for arm in section.arms:
        labels = sources.setdefault(arm.test_source, [])
        if arm.label not in labels:
            labels.append(arm.label)
    told = "; ".join(f"{source} ({listed(labels)})" for source, labels in sources.items())
    return [
        Finding(
            "result",
            "Held-out rows",
            f"Where the posteriors of test rows come from: {told}. The decoder was trained on no test row.",
        )
    ]


def tuning(section: Section) -> list[Finding]:
    """The price of the fair protocol's learning rates."""
    paid = [arm for arm in section.under("fair") if arm.tuning]
    if not paid:
        return []
    runs = {arm.label: sum(len(cell.trials) for cell in arm.tuning) for arm in paid}
    parts = [f"{arm.label} {significant(arm.tuning_seconds)} s in {runs[arm.label]} runs" for arm in paid]
    text = f"Spent before the runs of the fair protocol: {listed(parts)}."
    trained = sum(mean.value for arm in paid if (mean := arm.mean("train_seconds")).known)
    if trained > 0:
        share = sum(arm.tuning_seconds for arm in paid) / trained
        text += f" Together {significant(share, 2)} times the training of one seed of each."
    return [Finding("result", "Cost of tuning", text)]


def headline(sections: Sequence[Section]) -> list[Finding]:
    """The two claims over all sections, one finding a section and protocol."""
    found = []
    for section in sections:
        for protocol in section.protocols:
            gaps = {
                arm: section.joint_gap(arm, "final", "train", "elbo")
                for arm in section.amortized(protocol)
                if arm.width >= WIDE
            }
            gaps = {arm: gap for arm, gap in gaps.items() if gap.known}
            if gaps:
                text = f"{verdict(gaps)} F-VI / A-VI in the time to within {ELBO_SHARE:.0%} of the best ELBO "
                text += f"(claimed: {CLAIMED}): " + "; ".join(
                    f"{arm.label} {told_speed(section, protocol, arm)}" for arm in gaps
                )
                ahead = any(gap.sign < 0 for gap in gaps.values())
                kind = "warning" if ahead else "result"
                found.append(Finding(kind, f"{section.title}, {protocol}", f"{text}.", section.column(protocol)))
    return found


def verdict(gaps: dict[Arm, Mean]) -> str:
    """Which guides end above, level with, and below F-VI."""
    words = {
        -1: "above F-VI, which has thus not converged: {}.",
        0: "not to be told from F-VI: {}.",
        1: "short of F-VI: {}.",
    }
    said = []
    for sign, sentence in words.items():
        members = [
            f"{arm.label} by {with_error(Mean(abs(gap.value), gap.se, gap.seeds))}"
            for arm, gap in gaps.items()
            if gap.sign == sign
        ]
        if members:
            said.append(sentence.format(f"{listed(members)} nats a row"))
    return "Final ELBO " + " ".join(said)


def told_speed(section: Section, protocol: str, arm: Arm) -> str:
    steps, seconds = (spoken(speed(section, protocol, arm, unit)) for unit in ("step", "seconds"))
    return "unknown, neither got there" if steps == "unknown" else f"{steps} in steps and {seconds} in seconds"
