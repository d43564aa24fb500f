"""The tables of the images sweep: formatted for readers, and tidy for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

from experiments.document import Table, Value
from experiments.reports.images.cells import FIXED, TOLERANCES, Arm, Section
from experiments.reports.images.records import CellRecord, number, pick
from experiments.summary import Mean, median_duration, ratio_text, significant, with_error

MIB = 2**20


def results(section: Section) -> Table:
    """One line a guide and protocol."""
    header = [
        "protocol", "guide", "seeds", "lr local / global", "parameters local / global", "train ELBO", "test ELBO",
        "test rows by", "joint gap", "train MSE", "test MSE",
        *(f"{unit} to {title}" for title, _, _ in section.criteria for unit in ("steps", "seconds")),
        "noise scale", "training s", "tuning s", "peak memory MiB",
    ]  # fmt: skip
    note = (
        "ELBO and joint gap in nats a row, means over seeds ± one standard error; a test ELBO leaves out the KL "
        "divergence of theta. Times to a level are medians over seeds; '>' marks a median of seeds that had not got "
        "there when training ended."
    )
    brief = ["protocol", "guide", "seeds", "train ELBO", "joint gap", "train MSE", "test MSE", "training s"]
    if section.elbo_level is not None:
        brief += [name for name in header if " to ELBO" in name]
    return Table(section.title, header, [result_line(section, arm) for arm in section.arms], note, brief)


def result_line(section: Section, arm: Arm) -> list[str]:
    times = [arm.passages(name, level) for _, name, level in section.criteria]
    local, shared = arm.first.rates
    return [
        arm.protocol,
        arm.label,
        f"{len(arm.done)} of {len(arm.cells)}" if len(arm.done) < len(arm.cells) else f"{len(arm.cells)}",
        f"{significant(local)} / {significant(shared)}",
        f"{whole(arm.first, 'local')} / {whole(arm.first, 'global')}",
        with_error(arm.mean("final", "train", "elbo")),
        with_error(arm.mean("final", "test", "elbo")),
        arm.test_source,
        with_error(section.joint_gap(arm, "final", "train", "elbo")) if arm.label != "F-VI" else "",
        with_error(arm.mean("final", "train", "mse")),
        with_error(arm.mean("final", "test", "mse")),
        *(str(median_duration(passages, unit) or "-") for passages in times for unit in ("step", "seconds")),
        significant(arm.mean("noise_scale").value),
        significant(arm.mean("train_seconds").value),
        significant(arm.tuning_seconds) if arm.protocol == "fair" else "",
        significant(peak_memory(arm)),
    ]


def whole(cell: CellRecord, part: str) -> str:
    return f"{number(cell.result('parameters', part)):,.0f}"


def peak_memory(arm: Arm) -> float:
    """The largest peak over seeds, in MiB."""
    peaks = [number(pick(cell.record, "provenance", "peak_memory_bytes")) / MIB for cell in arm.cells.values()]
    return max((peak for peak in peaks if math.isfinite(peak)), default=math.nan)


def overview(sections: Sequence[Section]) -> Table:
    """One line a section and protocol: the two claims in numbers, for the best amortized guide."""
    header = [
        "data and model",
        "protocol",
        "F-VI ELBO",
        "best A-VI",
        "its joint gap",
        "F-VI / A-VI steps",
        "F-VI / A-VI seconds",
    ]
    lines = []
    for section in sections:
        for protocol in section.protocols:
            best = best_amortized(section, protocol)
            factorized = section.arm(protocol, "F-VI")
            elbo = factorized.mean("final", "train", "elbo") if factorized else None
            lines.append(
                [
                    section.title,
                    protocol,
                    with_error(elbo) if elbo else "not in the store",
                    best.label if best else "not in the store",
                    with_error(section.joint_gap(best, "final", "train", "elbo")) if best else "-",
                    *(speed(section, protocol, best, unit) for unit in ("step", "seconds")),
                ]
            )
    note = (
        "Ratios of the median times to the ELBO level of the section; above 1, the amortized guide is the faster one."
    )
    return Table("At a glance", header, lines, note)


def best_amortized(section: Section, protocol: str) -> Arm | None:
    """The amortized guide with the highest final training ELBO."""
    arms = [arm for arm in section.amortized(protocol) if arm.mean("final", "train", "elbo").known]
    return max(arms, key=lambda arm: arm.mean("final", "train", "elbo").value, default=None)


def speed(section: Section, protocol: str, arm: Arm | None, unit: str) -> str:
    factorized = section.arm(protocol, "F-VI")
    if arm is None or factorized is None or section.elbo_level is None:
        return "unknown"
    slow, fast = (median_duration(a.passages("elbo", section.elbo_level), unit) for a in (factorized, arm))
    return ratio_text(slow, fast)


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
    line |= spread("joint_gap", section.joint_gap(arm, "final", "train", "elbo"))
    line["elbo_level"] = section.elbo_level
    levels = [("elbo_level", "elbo", section.elbo_level)]
    for title, name, level in levels + [(f"mse_{level:g}", "train_mse", level) for level in TOLERANCES]:
        told = level is not None and (name == "elbo" or section.tells(level))
        for unit in ("step", "seconds"):
            duration = median_duration(arm.passages(name, level), unit) if told else None
            line[f"{unit}_to_{title}"] = duration.value if duration else None
            line[f"{unit}_to_{title}_is_lower_bound"] = duration.censored if duration else None
    line["noise_scale"] = known(arm.mean("noise_scale").value)
    line["train_seconds"] = known(arm.mean("train_seconds").value)
    line["tuning_seconds"] = known(arm.tuning_seconds)
    line["peak_memory_mib"] = known(peak_memory(arm))
    return line


def spread(name: str, mean: Mean) -> dict[str, Value]:
    return {name: known(mean.value), f"{name}_se": known(mean.se)}


def known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def cell_lines(cells: Sequence[CellRecord]) -> list[dict[str, Value]]:
    """Every record as one line, one for each trial of a tuning: settings, final numbers, provenance."""
    return [cell_line(run) for cell in cells for run in (cell.trials if cell.is_tuning else [cell])]


def cell_line(cell: CellRecord) -> dict[str, Value]:
    names = ("purpose", *FIXED, "protocol", "guide", "width", "seed", "lr_local", "lr_global")
    line: dict[str, Value] = {"key": pick(cell.record, "key")} | {name: cell.setting(name) for name in names}
    line |= {"status": cell.result("status"), "diverged_at": cell.result("diverged_at")}
    for rows in ("train", "test"):
        line |= {f"{rows}_{name}": cell.result("final", rows, name) for name in ("elbo", "elbo_se", "mse")}
        line |= {f"{rows}_{name}": cell.result("refined", rows, name) for name in ("gain", "gain_se")}
    line |= {name: cell.result(name) for name in ("noise_scale", "train_seconds", "evaluation_seconds")}
    provenance = ("started", "seconds", "commit", "dirty", "threads", "device", "device_name", "peak_memory_bytes")
    return line | {name: pick(cell.record, "provenance", name) for name in provenance}


def provenance(cells: Sequence[CellRecord]) -> Table:
    """Where the numbers come from, each different value once with the number of cells that carry it."""
    hours = sum(number(pick(cell.record, "provenance", "seconds")) for cell in cells) / 3600
    lines = [["cells", f"{len(cells)}, {hours:.2f} hours in all"]]
    starts = sorted(str(pick(cell.record, "provenance", "started")) for cell in cells)
    lines.append(["started", starts[0] if starts[0] == starts[-1] else f"{starts[0]} to {starts[-1]}"])
    lines.append(["cells running at once", f"up to {most_at_once(cells)}"])
    for title, describe in DESCRIPTIONS.items():
        counts: dict[str, int] = {}
        for cell in cells:
            counts[describe(cell)] = counts.get(describe(cell), 0) + 1
        lines += [[title, text if len(counts) == 1 else f"{text} ({count} cells)"] for text, count in counts.items()]
    return Table("Where the numbers come from", ["what", "value"], lines)


def described_commit(cell: CellRecord) -> str:
    changed = pick(cell.record, "provenance", "dirty")
    return f"{pick(cell.record, 'provenance', 'commit') or 'unknown'}{', with uncommitted changes' if changed else ''}"


def described_machine(cell: CellRecord) -> str:
    machine = pick(cell.record, "provenance", "machine")
    return f"{machine['system']}, {machine['processor']}, {machine['cores']} cores"


def described_graphs(cell: CellRecord) -> str:
    # Records of before this was told do not have it.
    compiled = cell.record["provenance"].get("compiled")
    return "unknown" if compiled is None else ", ".join(compiled) or "nothing"


DESCRIPTIONS = {
    "command": lambda cell: str(pick(cell.record, "provenance", "command")),
    "commit": described_commit,
    "machine": described_machine,
    "device": lambda c: f"{pick(c.record, 'provenance', 'device')} ({pick(c.record, 'provenance', 'device_name')})",
    "threads a cell": lambda cell: str(pick(cell.record, "provenance", "threads")),
    "compiled": described_graphs,
    "versions": lambda cell: ", ".join(
        f"{k} {v}" for k, v in sorted(pick(cell.record, "provenance", "versions").items())
    ),
}


def most_at_once(cells: Sequence[CellRecord]) -> int:
    """The largest number of cells of one machine whose running times overlap."""
    events = []
    for cell in cells:
        machine = described_machine(cell)
        begin = datetime.fromisoformat(str(pick(cell.record, "provenance", "started")))
        end = begin + timedelta(seconds=number(pick(cell.record, "provenance", "seconds")))
        events += [(machine, end, -1), (machine, begin, 1)]
    running, most = {}, 0
    for machine, _, change in sorted(events, key=lambda event: (event[1], event[2])):
        running[machine] = running.get(machine, 0) + change
        most = max(most, running[machine])
    return most
