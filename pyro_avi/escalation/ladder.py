"""The levels that rows climb until the draws of one are good enough."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_avi.closing.parts import Part, part_of
from pyro_avi.closing.richer_table import richer_table
from pyro_avi.closing.row_tables import read_tables, table_like, write_tables
from pyro_avi.closing.take_steps import take_steps
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.display.progress_bar import ProgressBar
from pyro_avi.escalation.chains import nuts_draws
from pyro_avi.escalation.results import LEVELS, Escalation, LevelCost
from pyro_avi.escalation.weighing import Need, weigh
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide

__all__ = ["Budget", "Ladder"]

# The R-hat above which chains have not mixed.
_MIXED = 1.05
# What a step costs in evaluations of the log joint: two draws, with their gradients.
_STEP = 6
# Between the seeds of levels, and of the chains of rows.
_BETWEEN, _CHAINS = 10_007, 50_021


class Budget(NamedTuple):
    """What the levels may cost, and what is good enough: options of :func:`~pyro_avi.escalate` by the same names."""

    need: Need
    num_steps: int
    lr: float
    richer: Family | None
    max_nuts: int
    num_warmup: int
    num_chains: int
    max_memory: int


@dataclass
class _State:
    """What is known of the rows so far, by the names of :class:`Escalation`.

    ``u`` are draws in unconstrained coordinates, ``elbo`` is that of the factors of the guide's family.
    """

    u: Tensor
    weights: Tensor
    level: Tensor
    met: Tensor
    gap: Tensor
    evidence: Tensor
    evidence_se: Tensor
    khat: Tensor
    ess: Tensor
    r_hat: Tensor
    seconds: Tensor
    elbo: Tensor

    def put(self, rows: Tensor, **values: Any) -> None:
        """Write what is known of some rows, the last dimension but for ``u``."""
        for name, value in values.items():
            whole = getattr(self, name)
            if name == "u":
                whole[:, rows] = value
            else:
                whole[..., rows] = value if not isinstance(value, Tensor) else value.to(whole)


class Ladder:
    """Answers rows level by level.

    Args:
        model: without global latents.
        guide: for it, with one set of rows and continuous latents.
        args, kwargs: of both.
        budget: what is good enough.
        seed: of the draws.
        bar: counts rows that are done.
    """

    def __init__(
        self,
        model: Callable,
        guide: LocalGuide,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        budget: Budget,
        seed: int,
        bar: ProgressBar,
    ):
        self._model, self._guide, self._budget, self._seed, self._bar = model, guide, budget, seed, bar
        (self._plate,) = guide.row_plates
        with isolated_sampling(seed), torch.no_grad():
            joint = LocalJoint(model, args, kwargs, plate=self._plate)
            table = cast(Tensor, guide.variational_parameters(*args, **kwargs))
        if joint.scale != 1 or len(table) != joint.num_rows:
            raise ValueError(
                f"Expected all rows of a data set, got {len(table)} of {joint.num_rows * joint.scale:g}.\n"
                "Pass them as a data set of their own, without positions."
            )
        # What rows have of the guide's family: its output, then what refinement has made of it, and the ELBO of that.
        self._table = table.detach().clone()
        count = joint.num_rows
        rows = torch.arange(count, device=joint.initial.device)
        self._whole = Part(args, kwargs, joint, rows)
        # Whether the model has calls for some of the rows, as far as is known.
        self._has_parts = True
        number = joint.initial.new_full((count,), torch.nan, dtype=torch.double)
        self._state = _State(
            # Their draws replace these at the first level.
            u=joint.initial.new_zeros(budget.need.num_samples, count, joint.num_latents),
            weights=number.expand(budget.need.num_samples, count).clone(),
            level=torch.zeros_like(rows),
            met=torch.zeros_like(rows, dtype=torch.bool),
            ess=torch.zeros_like(number),
            seconds=torch.zeros_like(number),
            elbo=torch.full_like(number, -torch.inf),
            **{name: number.clone() for name in ("gap", "evidence", "evidence_se", "khat", "r_hat")},
        )
        # Draws from the last factor of every row, which chains start from.
        self._last = torch.empty_like(self._state.u)
        self._cost: dict[str, LevelCost] = {}

    def climb(self) -> Escalation:
        """The answer for all rows."""
        levels = {"refined": self._refine, "richer": self._refine_richer, "NUTS": self._sample}
        self._time(0, self._whole.rows, self._draw)
        weighted = self._state.level == 1
        if weighted.any():
            # Their draws are those of the first level, and their seconds are among its.
            self._cost[LEVELS[1]] = LevelCost(int(weighted.sum()), 0.0)
        for level, answer in levels.items():
            rows = self._left(level)
            if len(rows):
                self._time(LEVELS.index(level), rows, answer)
        return self._result()

    def _left(self, level: str) -> Tensor:
        """The rows that a level is tried for."""
        rows = (~self._state.met).nonzero().flatten()
        if level == "richer" and not self._has_richer():
            return rows[:0]
        if level == "NUTS" and len(rows) > self._budget.max_nuts:
            worst = self._state.ess[rows].argsort(stable=True)[: self._budget.max_nuts]
            return rows[worst]
        return rows

    def _has_richer(self) -> bool:
        richer = self._budget.richer
        return richer is not None and richer.describe() != self._guide.family.describe()

    def _time(self, level: int, rows: Tensor, answer: Callable[[int, Tensor], Tensor]) -> None:
        done, start = int(self._state.met.sum()), perf_counter()
        with isolated_sampling(self._seed + level * _BETWEEN):
            effort = answer(level, rows).to(self._state.seconds)
        seconds = perf_counter() - start
        self._state.seconds[rows] += seconds * effort / effort.sum()
        self._cost[LEVELS[level]] = LevelCost(len(rows), seconds)
        self._bar.update(int(self._state.met.sum()) - done)

    def _draw(self, level: int, rows: Tensor) -> Tensor:
        """Draws from the guide, as they are or by their weights."""
        (row_factor,) = self._guide.row_factors
        counts, _ = self._answer(level, self._whole, row_factor.factor, self._table, rows)
        return counts

    def _refine(self, level: int, rows: Tensor) -> Tensor:
        """Draws from factors of the guide's family that are the rows' own."""
        part = self._part(rows)
        table, factor = self._with_steps(part, self._own_table(part), level)
        before = self._state.elbo[rows].clone()
        counts, elbo = self._answer(level, part, factor, table, rows)
        better = elbo > before
        at = torch.isin(part.rows, rows)
        self._table[rows[better]] = table[at][better].to(self._table)
        return counts + _STEP * self._budget.num_steps

    def _refine_richer(self, level: int, rows: Tensor) -> Tensor:
        """Draws from factors of a richer family."""
        part, family = self._part(rows), self._budget.richer
        assert family is not None
        start = richer_table(
            self._model, self._own_table(part), part.args, part.kwargs, family=family, seed=self._seed + level
        )
        table, factor = self._with_steps(part, start, level)
        counts, _ = self._answer(level, part, factor, table, rows)
        return counts + _STEP * self._budget.num_steps

    def _sample(self, level: int, rows: Tensor) -> Tensor:
        """Draws of Markov chains."""
        budget, state = self._budget, self._state
        size = budget.need.num_samples
        for row in rows.tolist():
            one = torch.tensor([row], device=rows.device)
            part = self._part(one)
            with isolated_sampling(self._seed + _CHAINS + row):
                chains = nuts_draws(
                    part.joint,
                    int((part.rows == row).nonzero()),
                    self._last[:, part.rows],
                    num_samples=size,
                    num_warmup=budget.num_warmup,
                    num_chains=budget.num_chains,
                )
            met = chains.r_hat <= _MIXED and chains.ess >= budget.need.min_ess
            if met or chains.ess > state.ess[row]:
                even = torch.full((size, 1), 1 / size)
                state.put(one, u=chains.u.unsqueeze(1), weights=even, level=level, met=met, gap=torch.nan)
                state.put(one, khat=torch.nan, ess=chains.ess, r_hat=chains.r_hat)
        return torch.ones_like(rows)

    def _answer(self, level: int, part: Part, factor, table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from factors of rows, and take over what is good enough, or better than what was.

        Args:
            level: the level that the factors are of.
            part: a call for these rows, and perhaps others.
            factor: what makes distributions of parameters.
            table: ``[B, P]`` those of the rows of the part.
            rows: ascending.

        Returns:
            ``[B]`` how many draws were weighed, and the ELBOs.
        """
        state = self._state
        position = torch.empty_like(self._whole.rows)
        position[part.rows] = torch.arange(len(part.rows), device=rows.device)
        found = weigh(
            lambda asked: factor.distribution(table[position[asked]]),
            lambda asked, u: self._log_joint(part, asked, u),
            rows,
            as_weights=part.joint.weigh,
            need=self._budget.need,
            to_the_end=level == LEVELS.index("richer" if self._has_richer() else "refined"),
        )
        self._last[:, rows] = found.u
        state.put(rows, evidence=found.evidence, evidence_se=found.evidence_se)
        if level <= LEVELS.index("refined"):
            state.put(rows, elbo=torch.maximum(found.elbo, state.elbo[rows]))
        taken = (found.met | (found.ess > state.ess[rows])).nonzero().flatten()
        state.put(
            rows[taken],
            # The first level has two names.
            level=torch.where(found.plain, level, max(level, 1))[taken],
            **{name: getattr(found, name)[..., taken] for name in ("weights", "met", "gap", "khat", "ess")},
            u=found.u[:, taken],
        )
        return found.counts, found.elbo

    def _log_joint(self, part: Part, rows: Tensor, u: Tensor) -> Tensor:
        """``[C, B]`` the log joint of rows of a part at coordinates ``[C, B, K]``."""
        # Another call takes about as long as some dozens of draws.
        part = self._part(rows) if 2 * len(rows) <= len(part.rows) else part
        among = torch.isin(part.rows, rows)
        # Where others are in it, they stay where they are.
        points = self._state.u[: len(u), part.rows]
        points[:, among] = u
        return part.joint.log_prob(points, max_memory=self._budget.max_memory)[:, among]

    def _part(self, rows: Tensor) -> Part:
        if not self._has_parts:
            return self._whole
        part = part_of(self._model, self._whole, rows, self._state.u[:2], plate=self._plate)
        self._has_parts = part is not self._whole or len(rows) == len(self._whole.rows)
        return part

    def _own_table(self, part: Part) -> FactorizedGuide:
        """A guide with what the rows of a part have of the guide's family."""
        guide = table_like(self._model, self._guide, part.args, part.kwargs)
        write_tables(guide, dict.fromkeys(guide.row_tables(), self._table[part.rows]))
        return guide

    def _with_steps(self, part: Part, guide: FactorizedGuide, level: int) -> tuple[Tensor, Any]:
        """The table of a guide after its steps, and what makes distributions of it."""
        budget, seed = self._budget, self._seed + level
        take_steps(self._model, guide, part.args, part.kwargs, num_steps=budget.num_steps, lr=budget.lr, seed=seed)
        (table,), (row_factor,) = read_tables(guide).values(), guide.row_factors
        return table, row_factor.factor

    def _result(self) -> Escalation:
        state, joint = self._state, self._whole.joint
        known = {name: getattr(state, name) for name in vars(state) if name not in ("u", "level", "elbo")}
        return Escalation(
            draws=joint.values(state.u),
            levels=tuple(LEVELS[level] for level in state.level.tolist()),
            cost=self._cost,
            tolerance=self._budget.need.tolerance,
            row_axes=joint.row_axes(),
            **known,
        )
