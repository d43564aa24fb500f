"""Refinement of those rows that may still gain, each until little is left."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_avi.closing.natural_steps import LEAST_FISHER
from pyro_avi.closing.parts import Call, Calls
from pyro_avi.closing.remaining_gain import GainOfSteps, RemainingGain
from pyro_avi.closing.row_tables import OpenRows, read_tables, write_tables
from pyro_avi.closing.take_steps import TwoDraws, take_steps
from pyro_avi.closing.weight_source import Draws, by_row
from pyro_avi.display.progress_bar import ProgressBar, progress_bar
from pyro_avi.estimators.gains import gains
from pyro_avi.guides import FactorizedGuide
from pyro_avi.training.fit import Fit, LearningRate

__all__ = ["refine_until_converged"]

# The fewest steps after which a row may be done.
_FEWEST = 5
# The cost of leaving rows out of a call, in steps of all rows, and in draws by which their start and end are compared.
_COST_OF_CUT, _DRAWS_OF_CUT = 4, 5
# Of rows that are said to have gained, at most this share has not, in expectation.
_LEVEL = 0.05


def refine_until_converged(
    model: Callable,
    guide: FactorizedGuide,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_steps: int,
    tolerance: float,
    lr: LearningRate,
    draws: Draws,
    seed: int,
    progress: bool,
) -> None:
    """Move the rows of a guide's tables, each until less than the tolerance is left for it to gain or the steps are taken.

    Args:
        model, guide: the guide is made for the model.
        args, kwargs: the arguments of both.
        num_steps, tolerance, lr, seed, progress: as in :func:`~pyro_avi.refine`.
        draws: by which the start and the end of rows are compared.

    Raises:
        ValueError: if the family has no formula of its Fisher information.
    """
    _check_family(guide)
    calls = Calls(model, guide, args, kwargs, seed)
    rows = _Rows(guide, num_steps, tolerance)
    call, taken = calls.whole, 0
    with progress_bar(num_steps, unit="step", progress=progress) as bar:
        while rows.any_open:
            if calls.can_be_cut and rows.cut_pays(call, num_steps - taken):
                call = rows.cut(call, calls.of(call, rows.open_rows()))
            watch = _Watch(rows, call, taken=taken, lr=lr, ends=calls.can_be_cut, bar=bar)
            options: dict[str, Any] = {"num_steps": num_steps - taken, "lr": watch.rate, "seed": seed + taken}
            take_steps(model, call.guide, call.args, call.kwargs, watch=watch, **options)
            taken = watch.taken
    _test_gains(calls, rows, draws)
    write_tables(guide, {name: each.result() for name, each in rows.tables.items()})
    found = {r.row_set.plates: x.refinement() for r, x in zip(guide.row_factors, rows.tables.values(), strict=True)}
    guide.refinement = found if len(found) > 1 else next(iter(found.values()))


def _check_family(guide: FactorizedGuide) -> None:
    if any(row_factor.factor.fisher(row_factor.function.table) is None for row_factor in guide.row_factors):
        raise ValueError(
            f"Expected a family with a formula of its Fisher information for tolerance=, got {type(guide.family).__name__}: "
            "how much is left is measured in it.\nLeave tolerance= out to take num_steps steps of all rows."
        )


def _test_gains(calls: Calls, rows: "_Rows", draws: Draws) -> None:
    """Put rows back to their starts that have moved without a significant gain, by draws that no step has seen.

    A quarter of the draws is enough for rows that have gained much; the others are asked again by all of them. Each time
    half of the level is spent, so that the false discovery rate is at most the level in all.
    """
    looks = [Draws(draws.num_samples // 4, draws.seed + 1), draws]
    for look in looks:
        undecided = rows.undecided_rows()
        if not len(undecided):
            return
        call = calls.whole
        if calls.can_be_cut and (rows.count - len(undecided)) * look.num_samples >= _DRAWS_OF_CUT * rows.count:
            call = calls.of(call, undecided)
        source = calls.weight_source(call)
        write_tables(call.guide, {name: each.start[call.rows] for name, each in rows.tables.items()})
        before = source.weights(call.guide, look).local
        write_tables(call.guide, {name: each.table[call.rows] for name, each in rows.tables.items()})
        gained = gains(before, source.weights(call.guide, look).local)
        for name, each in rows.tables.items():
            blocks = None if source.blocks is None else source.blocks[name]
            values = (gained.significant(_LEVEL / len(looks)), gained.rows, gained.rows_se)
            significant, more, error = (by_row(x, blocks).squeeze(-1).to(each.start.device) for x in values)
            each.decide(call.rows, significant, RemainingGain(more, error), is_last=look is looks[-1])


class _Rows:
    """What is known of all rows, and when it is asked whether they are done.

    Args:
        guide: with their tables.
        num_steps, tolerance: as for :func:`~pyro_avi.refine`.

    Attributes:
        tables: by the name of the table.
        at_start: by the name of the table the gains from the starts of the rows that take steps.
        checks: after how many steps. From one to the next their number doubles, so that the result at each is the mean of the
            second half of the steps so far.
    """

    def __init__(self, guide: FactorizedGuide, num_steps: int, tolerance: float):
        self.tables = {name: OpenRows(start, tolerance) for name, start in read_tables(guide).items()}
        self.at_start = {name: GainOfSteps() for name in self.tables}
        self.checks = {num_steps}
        while num_steps // 2 >= _FEWEST:
            num_steps //= 2
            self.checks.add(num_steps)

    @property
    def any_open(self) -> bool:
        """Whether any takes steps."""
        return any(bool(each.open.any()) for each in self.tables.values())

    @property
    def _only(self) -> OpenRows:
        (each,) = self.tables.values()
        return each

    @property
    def count(self) -> int:
        """The number of rows of the only table."""
        return len(self._only.start)

    def open_rows(self) -> Tensor:
        """The positions of those in the only table."""
        return self._only.open.nonzero().flatten()

    def undecided_rows(self) -> Tensor:
        """The positions of rows that have moved and may have to go back to their start, of all tables together."""
        return torch.cat([(each.moved & ~each.is_sure).nonzero().flatten() for each in self.tables.values()])

    def cut(self, call: Call, part: Call) -> Call:
        """The second call, for some rows of the first; those of the others need no longer be known."""
        if part is not call:
            among = torch.isin(torch.arange(self.count, device=part.rows.device)[call.rows], part.rows)
            self.at_start = {name: gain.of(among) for name, gain in self.at_start.items()}
        return part

    def cut_pays(self, call: Call, num_steps: int) -> bool:
        """Whether it saves more than it costs to leave the rows of a call that are done out of so many steps."""
        done = int((~self._only.open[call.rows]).sum())
        return done * num_steps >= _COST_OF_CUT * self.count


class _Watch:
    """Tells after some steps which rows of a call are done, and ends the steps where few are not.

    Args:
        rows: what is known of them.
        call: some of them.
        taken: the number of steps before.
        lr: the learning rate of all steps.
        ends: whether the steps end where it pays to leave rows out.
        bar: counts steps.

    Attributes:
        draws: see :class:`~pyro_avi.closing.take_steps.Watch`.
        taken: the number of steps so far.
        rate: the learning rate of the steps to watch.
    """

    draws: TwoDraws

    def __init__(self, rows: _Rows, call: Call, *, taken: int, lr: LearningRate, ends: bool, bar: ProgressBar):
        self._rows, self._call, self._ends, self._bar = rows, call, ends, bar
        self.taken = taken
        self.rate: LearningRate = (lambda step: lr(step + taken)) if callable(lr) else lr
        self._lr = lr if callable(lr) else lambda step: lr
        self._tables = call.guide.row_tables()
        self._fisher = {
            name: row_factor.factor.fisher
            for name, row_factor in zip(self._tables, call.guide.row_factors, strict=True)
        }
        self._all = {name: GainOfSteps() for name in self._tables}
        self._begin()

    def _begin(self) -> None:
        self._before = read_tables(self._call.guide)
        self._sums = {name: torch.zeros_like(table) for name, table in self._before.items()}
        self._gains = {name: GainOfSteps() for name in self._before}
        self._count = 0

    @torch.no_grad()
    def __call__(self, training: Fit) -> bool:
        for name, gradients in self.draws.gradients.items():
            fisher = self._information(name)
            for gain in (self._gains[name], self._all[name]):
                gain.add(gradients, fisher, self._lr(self.taken))
            # What the gradients would have been at the start, if the bound is as curved as its factor, and no flatter.
            moved = self._before[name] - self._rows.tables[name].start[self._call.rows]
            self._rows.at_start[name].add(gradients - fisher * moved, fisher, 0.0)
            self._before[name].copy_(self._tables[name])
            self._sums[name] += self._tables[name]
        self._count += 1
        self.taken += 1
        self._bar.update(1)
        if self.taken not in self._rows.checks:
            return False
        self._check()
        self._begin()
        return not self._rows.any_open or (
            self._ends and self._rows.cut_pays(self._call, max(self._rows.checks) - self.taken)
        )

    def _check(self) -> None:
        is_last = self.taken == max(self._rows.checks)
        # By all steps there is half of the noise, and more is left by the earlier ones, unless a row was near its best.
        lefts = {name: gain.estimate().least(self._all[name].estimate()) for name, gain in self._gains.items()}
        # Rows that are not done by the shape of their factors are not done by that of their bounds, which is no more curved.
        tables, starts = self._rows.tables, {name: gain.estimate() for name, gain in self._rows.at_start.items()}
        likely = [(tables[name].is_little(lefts[name]) | tables[name].is_little(starts[name])).any() for name in tables]
        if is_last or any(likely):
            flatter = {name: 1 / each for name, each in self._curvatures().items()}
            for name, each in tables.items():
                left, at_start = (x[name].times(flatter[name]) for x in (lefts, starts))
                rows = self._call.rows
                each.close(rows, each.is_little(at_start), self.taken, at_start, None)
                done = torch.ones_like(each.open[rows]) if is_last else each.is_little(left)
                each.close(rows, done, self.taken, left, self._sums[name] / self._count)

    def _curvatures(self) -> dict[str, Tensor]:
        """By table ``[N]`` that of the bounds of rows, in units of that of their factors."""
        fishers = {name: self._information(name) for name in self._gains}
        moves = {name: gain.move(fishers[name]) for name, gain in self._gains.items()}
        changes = self.draws.changes(moves, seed=self.taken)
        return {name: GainOfSteps.curvature(moves[name], changes[name], fishers[name]) for name in moves}

    def _information(self, name: str) -> Tensor:
        """``[N, P]`` the diagonal of the Fisher information before the next step."""
        return cast(Tensor, self._fisher[name](self._before[name])).clamp(min=LEAST_FISHER)
