"""The levels that rows climb until the draws of one are good enough."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_avi.closing.refine import refine
from pyro_avi.closing.richer_table import richer_table
from pyro_avi.closing.row_tables import read_tables, table_like, write_tables
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.display.progress_bar import ProgressBar
from pyro_avi.escalation.chains import nuts_draws
from pyro_avi.escalation.parts import Part, part_of
from pyro_avi.escalation.results import LEVELS, Escalation, LevelCost
from pyro_avi.estimators import iwelbo, khat
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide

__all__ = ["Budget", "Ladder"]

# Weights of which so many draws are effective have no tail to speak of, whatever the index of their largest says.
_EVEN = 0.9
# The upper end of an estimated gap, which one row in twenty exceeds, in standard errors.
_SCORE = 1.645
# The R-hat above which chains have not mixed.
_MIXED = 1.05
# Between the seeds of levels, and of the chains of rows.
_BETWEEN, _CHAINS = 10_007, 50_021


class Budget(NamedTuple):
    """What the levels may cost, and what is good enough: options of :func:`~pyro_avi.escalate` by the same names."""

    tolerance: float
    num_samples: int
    min_ess: int
    num_steps: int
    lr: float
    richer: Family | None
    max_nuts: int
    num_warmup: int
    num_chains: int
    max_memory: int


@dataclass
class _State:
    """What is known of the rows so far, by the names of :class:`Escalation`; ``u`` are draws in unconstrained coordinates."""

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
        # What rows have of the guide's family: its output, then what refinement has made of it.
        self._table = table.detach().clone()
        count = joint.num_rows
        rows = torch.arange(count, device=joint.initial.device)
        self._whole = Part(args, kwargs, joint, rows)
        number = joint.initial.new_full((count,), torch.nan, dtype=torch.double)
        self._state = _State(
            # Their draws replace these at the first level.
            u=joint.initial.new_zeros(budget.num_samples, count, joint.num_latents),
            weights=number.expand(budget.num_samples, count).clone(),
            level=torch.zeros_like(rows),
            met=torch.zeros_like(rows, dtype=torch.bool),
            ess=torch.zeros_like(number),
            seconds=torch.zeros_like(number),
            **{name: number.clone() for name in ("gap", "evidence", "evidence_se", "khat", "r_hat")},
        )
        # Draws from the last factor of every row, which chains start from.
        self._last = torch.empty_like(self._state.u)
        self._cost: dict[str, LevelCost] = {}

    def climb(self) -> Escalation:
        """The answer for all rows."""
        levels = {"refined": self._refine, "richer": self._refine_richer, "NUTS": self._sample}
        self._time(0, self._whole.rows, self._draw)
        for level, answer in levels.items():
            rows = self._left(level)
            if len(rows):
                self._time(LEVELS.index(level), rows, answer)
        return self._result()

    def _left(self, level: str) -> Tensor:
        """The rows that a level is tried for."""
        rows = (~self._state.met).nonzero().flatten()
        richer = self._budget.richer
        if level == "richer" and (richer is None or richer.describe() == self._guide.family.describe()):
            return rows[:0]
        if level == "NUTS" and len(rows) > self._budget.max_nuts:
            worst = self._state.ess[rows].argsort(stable=True)[: self._budget.max_nuts]
            return rows[worst]
        return rows

    def _time(self, level: int, rows: Tensor, answer: Callable[[int, Tensor], None]) -> None:
        done, start = int(self._state.met.sum()), perf_counter()
        with isolated_sampling(self._seed + level * _BETWEEN):
            answer(level, rows)
        seconds = perf_counter() - start
        self._state.seconds[rows] += seconds / len(rows)
        self._cost[LEVELS[level]] = LevelCost(len(rows), seconds)
        self._bar.update(int(self._state.met.sum()) - done)

    def _draw(self, level: int, rows: Tensor) -> None:
        """Draws from the guide, as they are or by their weights."""
        posterior = self._guide.fixed_posterior(*self._whole.args, **self._whole.kwargs)
        self._judge(level, self._whole, posterior, rows)
        weighted = self._state.level == 1
        if weighted.any():
            # Their weights are those of the same draws, and cost nothing beside.
            self._cost[LEVELS[1]] = LevelCost(int(weighted.sum()), 0.0)

    def _refine(self, level: int, rows: Tensor) -> None:
        """Weighted draws from factors of the guide's family that are the rows' own."""
        part = self._part(rows)
        refined = self._with_steps(part, self._own_table(part), level)
        (table,) = read_tables(refined).values()
        self._table[part.rows] = table.to(self._table)
        self._judge(level, part, refined.fixed_posterior(*part.args, **part.kwargs), rows)

    def _refine_richer(self, level: int, rows: Tensor) -> None:
        """Weighted draws from factors of a richer family."""
        part, family = self._part(rows), self._budget.richer
        assert family is not None
        start = richer_table(
            self._model, self._own_table(part), part.args, part.kwargs, family=family, seed=self._seed + level
        )
        refined = self._with_steps(part, start, level)
        self._judge(level, part, refined.fixed_posterior(*part.args, **part.kwargs), rows)

    def _sample(self, level: int, rows: Tensor) -> None:
        """Draws of Markov chains."""
        budget, state = self._budget, self._state
        for row in rows.tolist():
            one = torch.tensor([row], device=rows.device)
            part = self._part(one)
            with isolated_sampling(self._seed + _CHAINS + row):
                chains = nuts_draws(
                    part.joint,
                    int((part.rows == row).nonzero()),
                    self._last[:, part.rows],
                    num_samples=budget.num_samples,
                    num_warmup=budget.num_warmup,
                    num_chains=budget.num_chains,
                )
            met = chains.r_hat <= _MIXED and chains.ess >= budget.min_ess
            if met or chains.ess > state.ess[row]:
                even = torch.full((budget.num_samples, 1), 1 / budget.num_samples)
                state.put(one, u=chains.u.unsqueeze(1), weights=even, level=level, met=met, gap=torch.nan)
                state.put(one, khat=torch.nan, ess=chains.ess, r_hat=chains.r_hat)

    def _judge(self, level: int, part: Part, posterior, rows: Tensor) -> None:
        """Draw from factors of a part's rows, and take over what is good enough, or better than what was."""
        budget, state = self._budget, self._state
        u, weights = part.joint.weighted_draws(posterior, num_samples=budget.num_samples, max_memory=budget.max_memory)
        of = torch.isin(part.rows, rows).nonzero().flatten()
        rows = part.rows[of]
        u, local = u[:, of], weights.local[:, of]
        weights = part.joint.weigh(local)
        tails, bound = khat(weights), iwelbo(weights)
        self._last[:, rows] = u
        state.put(rows, evidence=bound.rows, evidence_se=bound.rows_se)
        ess = tails.ess
        assert ess is not None
        plain, plain_se = _divergence(local, bound.rows)
        left = (budget.num_samples / ess - 1) / (2 * budget.num_samples)
        trusted = ~tails.unreliable | (ess >= _EVEN * budget.num_samples)
        alone = trusted & (plain + _SCORE * plain_se <= budget.tolerance)
        enough = trusted & (left <= budget.tolerance) & (ess >= budget.min_ess)
        # Draws from the guide that are good enough as they are need no weights.
        even = alone & (level == 0)
        met = alone | enough
        taken = (met | (ess > state.ess[rows])).nonzero().flatten()
        count = len(local)
        state.put(
            rows[taken],
            u=u[:, taken],
            weights=torch.where(even, 1 / count, local.softmax(0))[:, taken],
            level=torch.where(even, 0, max(level, 1))[taken],
            met=met[taken],
            gap=torch.where(even, plain, left)[taken],
            khat=tails.rows[taken],
            ess=ess[taken],
        )

    def _part(self, rows: Tensor) -> Part:
        return part_of(self._model, self._whole, rows, self._state.u[:2], plate=self._plate)

    def _own_table(self, part: Part) -> FactorizedGuide:
        """A guide with what the rows of a part have of the guide's family."""
        guide = table_like(self._model, self._guide, part.args, part.kwargs)
        write_tables(guide, dict.fromkeys(guide.row_tables(), self._table[part.rows]))
        return guide

    def _with_steps(self, part: Part, start: FactorizedGuide, level: int) -> FactorizedGuide:
        return refine(
            self._model,
            start,
            *part.args,
            num_steps=self._budget.num_steps,
            lr=self._budget.lr,
            seed=self._seed + level,
            progress=False,
            **part.kwargs,
        )

    def _result(self) -> Escalation:
        state, joint = self._state, self._whole.joint
        known = {name: getattr(state, name) for name in vars(state) if name not in ("u", "level")}
        return Escalation(
            draws=joint.values(state.u),
            levels=tuple(LEVELS[level] for level in state.level.tolist()),
            cost=self._cost,
            tolerance=self._budget.tolerance,
            row_axes=joint.row_axes(),
            **known,
        )


def _divergence(local: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` how far the ELBO lies below the importance-weighted bound of the same draws, and its standard error."""
    influence = len(local) * local.softmax(0) - 1 - local
    return bound - local.mean(0), influence.std(0) / len(local) ** 0.5
