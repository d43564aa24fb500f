"""The tables of the images sweep: formatted for readers, and tidy for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.reporting.document import Table, Value
from experiments.reporting.statistics import Mean, Measured, mean_over_seeds, median_duration, significant, with_error
from experiments.sweeps.images.report.comparisons import (
    WIDE,
    Bounds,
    Comparison,
    best_amortized,
    share_of_the_way,
    speed,
)
from experiments.sweeps.images.report.records import CellRecord, number, pick
from experiments.sweeps.images.report.sections import FIXED, TITLES, TOLERANCES, Arm, Section
from experiments.sweeps.images.report.texts import listed

MIB = 2**20


def claims(sections: Sequence[Section]) -> Table:
    """Both claims, a line each for equal steps, equal seconds and the end of training, by data set and protocol."""
    header = ["data", "protocol", "compared", "reaches F-VI?", "F-VI's time / A-VI's", "F-VI - A-VI", "A-VI", "F-VI"]
    lines = [line for section in sections for protocol in section.protocols for line in claim_lines(section, protocol)]
    note = (
        f"A-VI: the best of width {WIDE} or more, failing that the widest; in brackets its share of F-VI's lead over the "
        "constant guide. Equal steps, equal seconds: those that A-VI's training took, F-VI from its own start; the ratio is of "
        "the times to A-VI's level. Convergence: F-VI from the best of its starts; the ratio is of all training seconds. "
        "'yes' to a ratio: 2 to 3, as claimed."
    )
    return Table('"k ≥ 64 reaches F-VI", "two to three times faster"', header, lines, note, brief=header)


def claim_lines(section: Section, protocol: str) -> list[list[str]]:
    wide = best_amortized(section, protocol, least=WIDE)
    if wide is None or not section.factorized(protocol):
        return []
    compared = Comparison(section, wide)
    converged = all(cell.converged for cell in wide.done.values()) and all(
        arm.cells[seed].converged for seed, arm in section.runs(protocol).items()
    )
    equal = {"step": "equal steps", "seconds": "equal seconds"}
    raced = [(compared.equal(unit), speed(*compared.times(unit))) for unit in equal]
    lines = [(what, bounds, reaches(section, protocol, bounds), ratio)
             for what, (bounds, ratio) in zip(equal.values(), raced, strict=True)]  # fmt: skip
    if converged:
        ratio = speed(*compared.to_the_end("seconds"))
        lines.append(("convergence", compared.final, reaches(section, protocol, compared.final), ratio))
    else:
        lines.append(("end of training", compared.final, "not converged", "not converged"))
    fixed = section.settings
    data = f"{TITLES.get(fixed['dataset'], fixed['dataset'])}, {fixed['noise']}{section.suffix}"
    return [
        [data, protocol, what, reached, ratio, with_error(bounds.gap),
         f"{with_error(bounds.amortized)} (k={wide.width})", with_error(bounds.factorized)]
        for what, bounds, reached, ratio in lines
    ]  # fmt: skip


def reaches(section: Section, protocol: str, bounds: Bounds) -> str:
    """Whether A-VI's bound cannot be told from F-VI's, and how much of the way from the constant guide it has gone."""
    if not bounds.gap.known:
        return "unknown"
    if bounds.gap.sign < 0:
        return "above"
    share = share_of_the_way(section, protocol, bounds)
    return ("no" if bounds.gap.sign else "yes") + ("" if share is None or share < 0 else f" ({share:.0%})")


def key(section: Section) -> Table:
    """One line a guide and protocol: what it reached, at what cost, and whether it had ended."""
    header = [
        "protocol",
        "guide",
        "train ELBO",
        "joint gap",
        "refined",
        "test ELBO",
        "test MSE",
        "steps",
        "seconds",
        "last half",
    ]
    note = (
        "Nats a row ± one standard error. Joint gap: F-VI's bound (no entry: this is it) minus the guide's. Refined: what rows "
        "gain from the guide's own output on, the decoder frozen. Last half (of the steps): its gain and seconds; ✓ converged: "
        f"{stated_share(section)}. 'F-VI from': started at that encoder's outputs, whose steps and seconds are counted in."
    )
    brief = [name for name in header if not name.startswith(("test", "refined"))]
    return Table(section.title, header, [key_line(section, arm) for arm in section.arms], note, brief)


def stated_share(section: Section) -> str:
    """What a last half is to gain less than."""
    shares = {number(cell.result("convergence", "share")) for arm in section.arms for cell in arm.done.values()}
    told = sorted(f"{share:.2g}" for share in shares if math.isfinite(share))
    return f"less than {listed(told) or 'a stated share'} of all that training gained"


def key_line(section: Section, arm: Arm) -> list[str]:
    return [
        arm.protocol,
        arm.label,
        with_error(arm.mean("final", "train", "elbo")),
        "" if is_the_bound(section, arm) else with_error(section.joint_gap(arm)),
        with_error(arm.mean("refined", "train", "gain")),
        with_error(arm.mean("final", "test", "elbo")),
        significant(arm.mean("final", "test", "mse").value),
        significant(taken(arm)),
        significant(arm.trained.value),
        last_half(arm),
    ]


def is_the_bound(section: Section, arm: Arm) -> bool:
    """Whether this is the F-VI that the gaps are taken to, in every seed."""
    return arm.guide in ("factorized", "continued") and set(section.starts(arm.protocol).values()) == {arm}


def taken(arm: Arm) -> float:
    """Steps taken, mean over seeds."""
    return mean_over_seeds(Measured(cell.steps) for cell in arm.done.values()).value


def last_half(arm: Arm) -> str:
    """What the last half of the steps gained in how many seconds, marked where every seed had converged."""
    gain, seconds = (arm.mean("convergence", name).value for name in ("late_gain", "late_seconds"))
    if not math.isfinite(gain):
        return "-"
    mark = " ✓" if all(cell.converged for cell in arm.done.values()) else ""
    return f"{'+' if gain > 0 else ''}{significant(gain, 2)} in {significant(seconds, 2)} s{mark}"


def peak_memory(arm: Arm) -> float:
    """The largest peak over seeds, in MiB."""
    peaks = [number(pick(cell.record, "provenance", "peak_memory_bytes")) / MIB for cell in arm.cells.values()]
    return max((peak for peak in peaks if math.isfinite(peak)), default=math.nan)


def summary_lines(sections: Sequence[Section]) -> list[dict[str, Value]]:
    """Tidy numbers, one line a section, protocol and guide; None where nothing is known."""
    return [summary_line(section, arm) for section in sections for arm in section.arms]


def summary_line(section: Section, arm: Arm) -> dict[str, Value]:
    line: dict[str, Value] = {name: section.settings[name] for name in FIXED}
    line |= {"protocol": arm.protocol, "guide": arm.guide, "width": arm.width}
    line |= {"seeds": " ".join(map(str, arm.cells)), "diverged": len(arm.cells) - len(arm.done)}
    line |= {"lr_local": known(arm.first.rates[0]), "lr_global": known(arm.first.rates[1])}
    line |= {f"parameters_{part}": arm.first.result("parameters", part) for part in ("local", "global", "model")}
    line["test_source"] = arm.test_source
    for rows in ("train", "test"):
        line |= spread(f"{rows}_elbo", arm.mean("final", rows, "elbo"))
        line |= spread(f"{rows}_mse", arm.mean("final", rows, "mse"))
        line |= spread(f"{rows}_amortization_gap", arm.mean("refined", rows, "gain"))
        line[f"{rows}_mean_image_mse"] = known(section.mean_image(rows))
    line |= spread("joint_gap", section.joint_gap(arm))
    line["f_vi_from_here"] = sum(start is arm for start in section.starts(arm.protocol).values())
    line |= {"steps": known(taken(arm)), "not_converged": len(arm.unfinished)}
    line |= {name: known(arm.mean("convergence", name).value) for name in ("late_gain", "late_seconds")}
    for level in TOLERANCES:
        for unit in ("step", "seconds"):
            duration = median_duration(arm.passages("train_mse", level), unit) if section.tells(level) else None
            line[f"{unit}_to_mse_{level:g}"] = duration.value if duration else None
            line[f"{unit}_to_mse_{level:g}_is_lower_bound"] = duration.censored if duration else None
    line["noise_scale"] = known(arm.mean("noise_scale").value)
    line["train_seconds"] = known(arm.trained.value)
    line["tuning_seconds"] = known(arm.tuning_seconds)
    line["peak_memory_mib"] = known(peak_memory(arm))
    return line


def spread(name: str, mean: Mean) -> dict[str, Value]:
    return {name: known(mean.value), f"{name}_se": known(mean.se)}


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cell_lines(cells: Sequence[CellRecord]) -> list[dict[str, Value]]:
    """Every run as one line, each trial of a tuning and each continuation too: settings, final numbers, provenance."""
    return [cell_line(run) for cell in cells for run in runs(cell)]


def runs(cell: CellRecord) -> list[CellRecord]:
    return cell.trials if cell.is_tuning else [cell, *([cell.continuation] if cell.continuation else [])]


def cell_line(cell: CellRecord) -> dict[str, Value]:
    names = ("purpose", *FIXED, "protocol", "guide", "width", "seed", "lr_local", "lr_global", "steps", "share")
    line: dict[str, Value] = {"key": pick(cell.record, "key")} | {name: cell.setting(name) for name in names}
    line |= {"status": cell.result("status"), "diverged_at": cell.result("diverged_at")}
    for rows in ("train", "test"):
        line |= {f"{rows}_{name}": cell.result("final", rows, name) for name in ("elbo", "elbo_se", "mse")}
        line |= {f"{rows}_{name}": cell.result("refined", rows, name) for name in ("gain", "gain_se")}
    judged = ("converged", "steps", "late_gain", "late_seconds", "rise")
    line |= {f"convergence_{name}": cell.result("convergence", name) for name in judged}
    line |= {name: cell.result(name) for name in ("noise_scale", "train_seconds", "evaluation_seconds")}
    provenance = ("started", "seconds", "commit", "dirty", "threads", "device", "device_name", "peak_memory_bytes")
    return line | {name: pick(cell.record, "provenance", name) for name in provenance}
