"""Refinement of those rows that may still gain, each until little is left."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_avi.closing.natural_steps import LEAST_FISHER
from pyro_avi.closing.parts import Call, Calls
from pyro_avi.closing.remaining_gain import GainOfSteps, RemainingGain
from pyro_avi.closing.row_tables import read_tables, write_tables
from pyro_avi.closing.take_steps import TwoDraws, take_steps
from pyro_avi.closing.weight_source import Draws, by_row
from pyro_avi.display.progress_bar import ProgressBar, progress_bar
from pyro_avi.estimators.gains import gains
from pyro_avi.guides import FactorizedGuide
from pyro_avi.rows.refinement import Refinement
from pyro_avi.training.fit import Fit, LearningRate

__all__ = ["refine_until_converged"]

# The fewest steps after which a row may be done.
_FEWEST = 5
# In steps of all rows: the cost of leaving rows out of a call, and that of the draws by which start and end are compared.
_COST_OF_CUT, _COST_OF_TEST = 10, 15


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
                call = calls.of(call, rows.open_rows())
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
    """Put rows back to their starts that have moved without a significant gain, by draws that no step has seen."""
    moved = rows.moved_rows()
    if not len(moved):
        return
    call = calls.whole
    if calls.can_be_cut and (rows.count - len(moved)) * _COST_OF_TEST >= _COST_OF_CUT * rows.count:
        call = calls.of(call, moved)
    source = calls.weight_source(call)
    write_tables(call.guide, {name: each.start[call.rows] for name, each in rows.tables.items()})
    before = source.weights(call.guide, draws).local
    write_tables(call.guide, {name: each.table[call.rows] for name, each in rows.tables.items()})
    gained = gains(before, source.weights(call.guide, draws).local)
    for name, each in rows.tables.items():
        blocks = None if source.blocks is None else source.blocks[name]
        values = (gained.significant(), gained.rows, gained.rows_se)
        significant, more, error = (by_row(x, blocks).squeeze(-1).to(each.start.device) for x in values)
        each.keep_start(call.rows, ~significant, RemainingGain(more, error))


class _TableRows:
    """What is known of the rows of one table.

    Attributes:
        start, table: ``[N, P]`` where rows began, and where they were when they were done.
        open: ``[N]`` rows that take steps.
        moved: ``[N]`` rows that do not keep their start.
        steps: ``[N]`` how many each has taken.
    """

    def __init__(self, start: Tensor, tolerance: float):
        self.start, self.table, self._tolerance = start, start.clone(), tolerance
        self.open = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self.moved, self.steps = torch.zeros_like(self.open), torch.zeros_like(self.open, dtype=torch.long)
        number = torch.full_like(self.open, torch.nan, dtype=torch.double)
        self.left, self.left_se = number, number.clone()

    def is_little(self, left: RemainingGain) -> Tensor:
        """Whether less than the tolerance is left, at a confidence of 95 %. What is no number is not known to be little."""
        return left.at_most() < self._tolerance

    def close(self, rows: slice | Tensor, done: Tensor, steps: int, left: RemainingGain, table: Tensor | None) -> None:
        """Note that open ones of some rows are done, where they are, ``None`` for at their start."""
        at = _among(self.open, rows, self.open[rows] & done)
        chosen = at[rows]
        self.open[at], self.steps[at], self.moved[at] = False, steps, table is not None
        self.left[at], self.left_se[at] = left.rows[chosen], left.rows_se[chosen]
        if table is not None:
            self.table[at] = table[chosen]

    def keep_start(self, rows: slice | Tensor, back: Tensor, gained: RemainingGain) -> None:
        """Put rows back that have moved; what they have gained is left to them then."""
        at = _among(self.open, rows, self.moved[rows] & back)
        chosen = at[rows]
        left = RemainingGain(self.left[at], self.left_se[at]).plus(gained.rows[chosen], gained.rows_se[chosen])
        self.moved[at], self.left[at], self.left_se[at] = False, left.rows, left.rows_se

    def result(self) -> Tensor:
        """``[N, P]``."""
        return torch.where(self.moved.unsqueeze(-1), self.table, self.start)

    def refinement(self) -> Refinement:
        """What to tell."""
        converged = self.is_little(RemainingGain(self.left, self.left_se))
        return Refinement(self.steps, self.left, self.left_se, converged)


def _among(like: Tensor, rows: slice | Tensor, chosen: Tensor) -> Tensor:
    """``[N]`` those chosen of some rows."""
    result = torch.zeros_like(like)
    result[rows] = chosen
    return result


class _Rows:
    """What is known of all rows, and when it is asked whether they are done.

    Args:
        guide: with their tables.
        num_steps, tolerance: as for :func:`~pyro_avi.refine`.

    Attributes:
        tables: by the name of the table.
        checks: after how many steps. From one to the next their number doubles, so that the result at each is the mean of the
            second half of the steps so far.
    """

    def __init__(self, guide: FactorizedGuide, num_steps: int, tolerance: float):
        self.tables = {name: _TableRows(start, tolerance) for name, start in read_tables(guide).items()}
        self.checks = {num_steps}
        while num_steps // 2 >= _FEWEST:
            num_steps //= 2
            self.checks.add(num_steps)

    @property
    def any_open(self) -> bool:
        """Whether any takes steps."""
        return any(bool(each.open.any()) for each in self.tables.values())

    @property
    def _only(self) -> _TableRows:
        (each,) = self.tables.values()
        return each

    @property
    def count(self) -> int:
        """The number of rows of the only table."""
        return len(self._only.start)

    def open_rows(self) -> Tensor:
        """The positions of those in the only table."""
        return self._only.open.nonzero().flatten()

    def moved_rows(self) -> Tensor:
        """The positions of rows that do not keep their start, of all tables together."""
        return torch.cat([each.moved.nonzero().flatten() for each in self.tables.values()])

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
        self.taken, self._first = taken, taken == 0
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
        likely = [self._rows.tables[name].is_little(left).any() for name, left in lefts.items()]
        if is_last or any(likely):
            flatter = {name: 1 / each for name, each in self._curvatures().items()}
            for name, each in self._rows.tables.items():
                gain, left, rows = self._gains[name], lefts[name].times(flatter[name]), self._call.rows
                if self._first:
                    # Of rows at their start more is left than after the first steps.
                    at_start = gain.estimate().times(gain.decay**-2 * flatter[name])
                    each.close(rows, each.is_little(at_start), self.taken, at_start, None)
                done = torch.ones_like(each.open[rows]) if is_last else each.is_little(left)
                each.close(rows, done, self.taken, left, self._sums[name] / self._count)
        self._first = False

    def _curvatures(self) -> dict[str, Tensor]:
        """By table ``[N]`` that of the bounds of rows, in units of that of their factors."""
        fishers = {name: self._information(name) for name in self._gains}
        moves = {name: gain.move(fishers[name]) for name, gain in self._gains.items()}
        changes = self.draws.changes(moves, seed=self.taken)
        return {name: GainOfSteps.curvature(moves[name], changes[name], fishers[name]) for name in moves}

    def _information(self, name: str) -> Tensor:
        """``[N, P]`` the diagonal of the Fisher information before the next step."""
        return cast(Tensor, self._fisher[name](self._before[name])).clamp(min=LEAST_FISHER)
