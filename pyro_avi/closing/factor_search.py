"""The search for every row's best factor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_avi.closing.remaining_gain import RemainingGain, remaining_gain
from pyro_avi.closing.row_tables import Tables, choose, read_tables, write_tables
from pyro_avi.closing.take_steps import take_steps
from pyro_avi.closing.weight_source import Draws, JointWeights, WeightSource, by_row
from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.display.progress_bar import ProgressBar
from pyro_avi.estimators.gains import cross_fitted, gains
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.evidence.mixture import missed_modes
from pyro_avi.guides import FactorizedGuide

__all__ = ["Budget", "FactorSearch", "SearchResult", "moments"]

# Draws by which factors are compared during the search, the same for all: fewer than for the reported bounds.
_DRAWS = 300
# Draws by which the search looks for modes that no start has led to, and how often it does.
_PILOT, _LOOKS = 800, 2
# The most that a converged row may still gain, in tolerances; the least that a row must gain to move, in standard errors.
_LEFT, _MOVES = 3.0, 1.0
# A row that gains less, in tolerances, has its learning rate halved, since the noise of a step is what limits it then.
_SLOWS = 10.0


class Budget(NamedTuple):
    """The budget of a search, and what counts as a gain.

    Attributes:
        num_steps: the steps of a round.
        lr: the learning rate of the first round.
        max_rounds: the largest number of rounds.
        tolerance: the gain of a round, in nats, below which a row counts as finished.
    """

    num_steps: int
    lr: float
    max_rounds: int
    tolerance: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        weights: of the better factor of every row, the first one or that of the search, chosen by other draws than these.
        converged: ``[M]`` which rows have stopped to gain and have a gradient by which little can be gained.
        remaining: ``[M]`` what rows may still gain; ``None`` where no gradient is known.
        ends: where the steps from each start have led.
    """

    weights: LogWeights
    converged: Tensor
    remaining: RemainingGain | None
    ends: list[Tables]


class FactorSearch:
    """Refines tables in rounds.

    A row moves to where a round has led it if it gains there, by draws that it was not trained on, and otherwise stays. Where
    it gains less than ten tolerances, its learning rate is halved. It has converged when it has gained less than the tolerance
    in the last round, and its gradient promises at most three times that, at a confidence of 95 %. In the end what was found is
    compared with where the rows began by draws that had no part in any choice.

    Args:
        model: of the rows, without global latents.
        source: of the log weights of the factors.
        args, kwargs: of the model.
        budget: of the search.
        seed: of the draws on the way.
        report: the draws by which the first factors are compared with what was found.
        bar: counts the rounds, one for each start; its total grows by the largest number that may still come.
    """

    def __init__(
        self,
        model: Callable,
        source: WeightSource,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        budget: Budget,
        seed: int,
        report: Draws,
        bar: ProgressBar,
    ):
        self._model, self._source, self._args, self._kwargs = model, source, args, kwargs
        self._budget, self._seed, self._report = budget, seed, report
        self._bar = bar

    def improve(self, guide: FactorizedGuide, before: LogWeights, starts: Sequence[Tensor | Tables]) -> SearchResult:
        """The best factor of every row: that of the guide, or what the rounds find where the row really gains by it.

        Args:
            guide: with a table for the rows, which ends with the best.
            before: the weights of the factors to improve, by the draws of the report.
            starts: ``[N, P]`` or ``[P]`` where the first round starts, once from each; of several tables by name.

        Raises:
            ValueError: if a start has another shape.
        """
        first = read_tables(guide)
        best, converged, remaining, ends = self._rounds(guide, [_start(guide, start) for start in starts])
        after = self._source.weights(guide, self._report)
        gained = gains(before.local, after.local)
        # A factor with draws of zero density is not taken.
        better = gained.significant() & after.local.isfinite().all(0)
        write_tables(guide, choose(better, best, first, self._source.blocks))
        if remaining is not None:
            # A row that keeps its first factor may still gain what the other factor seems to gain.
            remaining = remaining.plus(torch.where(better, 0.0, gained.rows), torch.where(better, 0.0, gained.rows_se))
            converged = converged & (better | self._is_little(remaining))
        return SearchResult(replace(after, local=cross_fitted(before.local, after.local)), converged, remaining, ends)

    def _rounds(
        self, guide: FactorizedGuide, starts: Sequence[Tables]
    ) -> tuple[Tables, Tensor, RemainingGain | None, list[Tables]]:
        """The best tables, which the guide has at the end; converged rows; their remaining gain; where each start has led."""
        best, local = read_tables(guide), self._weigh(guide)
        share, ends = torch.ones_like(local[0]), []
        self._expect(len(starts) + self._budget.max_rounds - 1)
        for turn in range(self._budget.max_rounds):
            gain = torch.zeros_like(share)
            queue = list(starts) if turn == 0 else [best]
            while queue:
                write_tables(guide, queue.pop(0))
                self._take_steps(guide, share, self._seed + turn)
                self._bar.update()
                end, there = read_tables(guide), self._weigh(guide)
                gained = gains(local, there)
                better = gained.rows > _MOVES * gained.rows_se
                best = choose(better, end, best, self._source.blocks)
                local = torch.where(better, there, local)
                gain = gain + torch.where(better, gained.rows, 0.0)
                if turn == 0:
                    ends.append(end)
                    # Other modes are looked for when all starts have led to theirs.
                    looked = len(ends) - len(starts)
                    missed = self._missed(guide, best, ends) if not queue and 0 <= looked < _LOOKS else []
                    self._expect(len(missed))
                    queue += missed
            stopped = gain < self._budget.tolerance
            share = torch.where(gain < _SLOWS * self._budget.tolerance, 0.5 * share, share)
            if not stopped.all() and turn + 1 < self._budget.max_rounds:
                continue
            write_tables(guide, best)
            remaining = self._remaining_gain(guide)
            # Without a gradient a row is not known to have converged.
            converged = stopped & (torch.zeros_like(stopped) if remaining is None else self._is_little(remaining))
            if converged.all():
                break
        return best, converged, remaining, ends

    def _expect(self, rounds: int) -> None:
        self._bar.total += rounds

    def _missed(self, guide: FactorizedGuide, best: Tables, ends: Sequence[Tables]) -> list[Tables]:
        """Where to start from to find a mode that no factor so far covers, if draws of the prior have met one."""
        if not isinstance(self._source, JointWeights):
            return []
        factor = guide.row_factors[0].factor
        ((name, table),) = best.items()
        with isolated_sampling(self._seed - 3), torch.no_grad():
            factors = [factor.distribution(each) for each in (table, *(end[name] for end in ends))]
            center, spread = moments(factors[0])
            place, missed = missed_modes(
                self._source.joint, factors, center, num_samples=_PILOT, max_memory=self._source.max_memory
            )
            start = factor.family.initial(place, spread)
        return [{name: torch.where(by_row(missed, None), start, table)}] if missed.any() else []

    def _weigh(self, guide: FactorizedGuide) -> Tensor:
        return self._source.weights(guide, Draws(_DRAWS, self._seed - 1)).local

    def _take_steps(self, guide: FactorizedGuide, share: Tensor, seed: int) -> None:
        blocks = self._source.blocks
        shares = {name: by_row(share, None if blocks is None else blocks[name]) for name in guide.row_tables()}
        slower = None if (share == 1).all() else shares
        take_steps(
            self._model,
            guide,
            self._args,
            self._kwargs,
            num_steps=self._budget.num_steps,
            lr=self._budget.lr,
            seed=seed,
            shares=slower,
        )

    def _remaining_gain(self, guide: FactorizedGuide) -> RemainingGain | None:
        if not isinstance(self._source, JointWeights):
            return None
        row_factor, memory = guide.row_factors[0], self._source.max_memory
        factor, table = row_factor.factor, row_factor.function.table
        return remaining_gain(self._source.joint, factor, table, seed=self._seed - 2, max_memory=memory)

    def _is_little(self, remaining: RemainingGain) -> Tensor:
        return remaining.at_most() < _LEFT * self._budget.tolerance


def _start(guide: FactorizedGuide, given: Tensor | Tables) -> Tables:
    tables = guide.row_tables()
    given = given if isinstance(given, Mapping) else dict.fromkeys(tables, given)
    for name, table in tables.items():
        if name not in given or given[name].shape not in (table.shape, table.shape[1:]):
            got = tuple(given[name].shape) if name in given else f"tables for {sorted(given)}"
            raise ValueError(
                f"Expected start of shape {tuple(table.shape)}, one row for each row of {name!r} to refine, got {got}."
            )
    return {name: given[name].detach().to(table).expand_as(table) for name, table in tables.items()}


def moments(posterior: TorchDistribution) -> tuple[Tensor, Tensor]:
    """The means and standard deviations ``[N, K]`` of the rows' latents, those of 200 draws where there is no formula."""
    try:
        return posterior.mean, posterior.stddev
    except NotImplementedError:
        draws = posterior.rsample((200,)).detach()
        return draws.mean(0), draws.std(0)
