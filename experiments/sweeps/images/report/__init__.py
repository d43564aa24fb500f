"""The report of the images sweep: how much amortization costs on real images, under two protocols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from experiments.reporting.document import Document, Figure, Note
from experiments.reporting.figures import curves
from experiments.reporting.statistics import mean_over_seeds, paired_difference, ratio_text, significant
from experiments.sweeps.images.report import claims, figures, tables
from experiments.sweeps.images.report.sections import BOUND, Comparison, Section, read

__all__ = ["document"]

READING = f"""
Constant: one set of variational parameters for all rows; A-VI k: an encoder of width k computes them; F-VI: every row has its
own; F-VI from k: went on from that encoder's outputs, its steps and seconds counted in. Published: one learning rate, a fixed
number of steps. Fair: rates tuned for every guide, training until the last half of the steps gains less than a stated share.

ELBO: nats a row, of training rows with the KL divergence of the decoder's weights, of test rows without. Curves and times
watch the first 500 training rows. A-VI's level: its last point less {claims.LEVEL_SHARE:.0%} of its lead over the constant
guide; '>': too few seeds got there. F-VI of test rows is refined with the decoder frozen, which no encoder is granted.
"""


def document(records: Mapping[str, Mapping]) -> Document:
    """The report of these records, by key.

    Raises:
        ReportError: if a record lacks a field of this sweep.
    """
    found = read(records)
    colours = figures.palette(found)
    nothing = Note(
        "warning", "The store holds tuning cells alone; the results follow when the sweep goes on.", "No result yet"
    )
    return Document(
        title="What amortization costs on images",
        lead="One Bayesian decoder and three guides, which differ in where the variational parameters of a row come from.",
        notes=[_answer(section, colours) for section in found] or [nothing],
        tables=[claims.table(found)] if found else [],
        parts=[*(_part(section, colours) for section in found), Document("How to read this", READING)],
    )


def _answer(section: Section, colours: figures.Colours) -> Note:
    """The order of the guides, what amortization costs and saves, of the fair protocol where the store has it."""
    comparison = section.comparisons[-1]
    grid = figures.panels([comparison], colours, figures.BOUNDS[1:])
    figure = Figure("opening", "Training ELBO by second", "A line a seed.", partial(curves, grid))
    best, constant = comparison.best(), comparison.arm("constant")
    if best is None or not comparison.bound:
        text = f"No seed of both F-VI and an amortized guide has finished under the {comparison.protocol} protocol."
        return Note("warning", text, section.title, figure)
    _, race, final = claims.compare(section, comparison, best)
    chain = f"F-VI ({final.factorized}) {'<' if final.gap.sign < 0 else '≥'} {best.label} ({final.amortized})"
    if constant.done:
        lead = paired_difference(best.each(*BOUND), constant.each(*BOUND))
        chain += f" {'<' if lead.sign < 0 else '≥'} constant ({constant.mean(*BOUND)})"
    late = "; ".join(_late(comparison, best.label))
    cost = (
        f"Not converged; the last half of the steps changed {late}."
        if late
        else f"Amortization costs {final.gap} nats a row; to A-VI's level A-VI takes {race.fast or '-'} s and F-VI "
        f"{race.slow or '-'} s (ratio {ratio_text(race.slow, race.fast)})."
    )
    text = f"{chain} nats a row; {comparison.protocol} protocol, seeds: {final.gap.seeds}. {cost}"
    return Note("warning" if late or " < " in chain else "answer", text, section.title, figure)


def _late(comparison: Comparison, best: str) -> Iterator[str]:
    """What the bounds of F-VI, the best A-VI and the constant guide still gained, and at what cost, where not converged."""
    runs = {label: list(comparison.arm(label).done.values()) for label in (best, "constant")}
    for label, every in ({"F-VI": [arm.runs[seed] for seed, arm in comparison.trained.items()]} | runs).items():
        late = [run for run in every if not run.converged]
        gain, seconds = (
            mean_over_seeds(run.mean("convergence", name) for run in late).value
            for name in ("late_gain", "late_seconds")
        )
        if late:
            yield f"{label} {'+' * (gain > 0)}{significant(gain, 2)} nats a row in {significant(seconds, 2)} s"


def _part(section: Section, colours: figures.Colours) -> Document:
    """One section of the report."""
    fixed, caption = section.settings, "A line a seed; a cross: it diverged."
    bounds, errors = (
        partial(curves, figures.panels(section.comparisons, colours, shown))
        for shown in (figures.BOUNDS, figures.ERRORS)
    )
    shown = [
        Figure("elbo", "ELBO by step and by second", caption, bounds),
        Figure("mse", "Reconstruction error by second", caption, errors),
    ]
    for each in filter(figures.pictured, section.comparisons):
        drawing = partial(figures.reconstructions, each, colours)
        caption = "Test images, and reconstructions at the posterior means by the first seeds."
        shown.append(Figure(f"{each.protocol} reconstructions", f"Reconstructions, {each.protocol}", caption, drawing))
    lead = (
        f"{fixed['num_train']:,} training rows, minibatches of {fixed['batch_size']:,}, {fixed['latent_dim']} latents a row, "
        f"hidden layers of {fixed['hidden_dim']}."
    )
    return Document(section.title, lead, list(_warnings(section)), [tables.guides(section)], shown)


def _warnings(section: Section) -> Iterator[Note]:
    """What keeps the numbers of a section from carrying a conclusion."""
    runs = [(f"{arm.label} ({arm.protocol})", run) for arm in section.arms for run in arm.runs.values()]
    lost = [(name, run.setting("seed"), run.result("diverged_at")) for name, run in runs if run.diverged]
    found = {
        "Diverged, left out": [f"{name}, seed {seed}, step {step}" for name, seed, step in lost],
        "Not converged": [name for name, run in runs if run.converged is False and not run.diverged],
        "Learning rates at the edge of those tried": _edges(section),
        "Trained in another way, left out": [
            f"{run.label} ({run.setting('protocol')}) at {run.variant}" for run in section.left_out
        ],
    }
    texts = {title: "; ".join(dict.fromkeys(told)) for title, told in found.items()}
    yield from (Note("warning", text, title) for title, text in texts.items() if text)


def _edges(section: Section) -> Iterator[str]:
    """Tuned learning rates at the edge of all that were tried: a better one may lie beyond."""
    for arm in section.arms:
        trials = [trial for run in arm.tunings for trial in run.result("trials")]
        for name in ("lr_local", "lr_global"):
            rates, chosen = {trial[name] for trial in trials}, next(iter(arm.runs.values())).setting(name)
            if len(rates) > 1 and chosen in (min(rates), max(rates)):
                yield f"{arm.label}: {name} {chosen:g} of {min(rates):g} to {max(rates):g}"
