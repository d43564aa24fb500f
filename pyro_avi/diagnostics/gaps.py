"""The inference gap of a guide, split into what its family and what its inference function costs."""

from collections.abc import Callable, Mapping, Sequence

import torch
from pyro.infer import config_enumerate
from torch import Tensor

from pyro_avi.closing.factor_search import Budget, FactorSearch
from pyro_avi.closing.richer_table import richer_table
from pyro_avi.closing.row_tables import Tables, read_tables, table_like, write_tables
from pyro_avi.closing.weight_source import Draws, JointWeights, WeightSource, weight_source
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.diagnostics.gap_results import Gaps
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.estimators import khat
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.evidence.ais import Annealing, annealed_weights, isolated_sampling
from pyro_avi.evidence.evidence import Evidence, exact_evidence, paired_mean, with_refinement_error
from pyro_avi.evidence.hold_globals import Theta, hold_globals
from pyro_avi.evidence.mixture import mixture_weights
from pyro_avi.families import Family
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.guides import FactorizedGuide
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed

__all__ = ["measure_gaps"]

# Between the seeds of draws that have to be independent.
_MOMENTS, _STEPS, _CHAINS, _MIXTURE = 10_007, 20_011, 30_011, 40_013
# The least draws of a mixture, many at once, and of wide factors, one by one: fewer do not meet what the best factors miss.
_MIXED, _WIDE = 1000, 100


@in_turn
@evaluation_mode()
def measure_gaps(
    model: Callable,
    guide: LocalGuide,
    *args,
    num_samples: int,
    num_steps: int,
    lr: float = 0.2,
    max_rounds: int = 5,
    tolerance: float = 0.01,
    starts: Sequence[Tensor] = (),
    richer: Family | None = None,
    evidence: Tensor | None = None,
    annealing: Annealing | None = None,
    reverse: Mapping[str, Tensor] | None = None,
    theta: Theta = "mean",
    max_memory: int = 2**30,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> Gaps:
    r"""Measure how much a guide's bound loses for every row, and why.

    .. math:: \underbrace{\log p(x_n) - \mathrm{ELBO}_n(q)}_{\text{inference}}
              = \underbrace{\log p(x_n) - \mathrm{ELBO}_n(q^*_n)}_{\text{approximation}}
              + \underbrace{\mathrm{ELBO}_n(q^*_n) - \mathrm{ELBO}_n(q)}_{\text{amortization}}

    all at fixed model and :math:`\theta`. :math:`q^*_n` is looked for by the steps of :func:`~pyro_avi.refine` from the guide's
    own output, from the mean of its outputs, from a standard normal, and where draws of the prior show a mode that none of
    these has led to. It is refined in further rounds, each row at a rate of its own, until a round gains less than
    ``tolerance`` and the gradient of the row's bound says that little is left; other rows are reported. A row takes it only
    where it gains beyond doubt. All bounds are measured by the same fresh draws, moved and stretched by the factors, and by
    their mirror images, so that most of their noise cancels in the differences; half of them choose what the other half
    reports.

    The evidence is the model's, if it has a ``log_evidence`` and no global latents, or what is given; else the best of the
    importance-weighted bounds from the best factor, from a mixture of all that was found and the prior (where rows share
    observations or are of several plates, from independent standard normals and equally probable values instead) and, with
    ``annealing=``, of :func:`~pyro_avi.ais`. Then the gaps are intervals: see :class:`~pyro_avi.Gaps`.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides. On held-out rows a factorized guide has to be refined first.
        *args, **kwargs: the arguments of the model for the rows to measure, all rows of a data set: for held-out rows the
            model must take another number of rows than it was trained on.
        num_samples: ``S``, the draws that bounds and the importance-weighted bound are measured by, at least 25, rounded up
            to an even number.
        num_steps: the steps of one round of refinement.
        lr: its learning rate, see :func:`~pyro_avi.refine`; halved for a row that gains less than ten tolerances in a round.
        max_rounds: the rounds after which refinement ends.
        tolerance: the gain of a round, in nats, below which a row has stopped to gain.
        starts: further variational parameters ``[N, P]`` or ``[P]`` to start from.
        richer: a family that contains the guide's, for example :class:`~pyro_avi.MultivariateNormal` or
            :class:`~pyro_avi.RowFlow`, that splits the approximation gap further: what its best member gains is reported,
            and serves the evidence. It is refined from the normals with the moments of :math:`q^*_n`, and where that
            gains nothing :math:`q^*_n` stays.
        evidence: ``[N]`` exact log evidences, given :math:`\theta`.
        annealing: ``num_chains``, ``num_temperatures``, ``num_leapfrog`` and ``start`` of :func:`~pyro_avi.ais`.
        reverse: exact latents of simulated data, for a bound from above with the budget of ``annealing``.
        theta: what the global latents are held at: ``"mean"`` of the guide's factor in unconstrained coordinates,
            ``"draw"`` for one from it, or values by site.
        max_memory: in bytes, what the draws that are evaluated at a time may take. A CPU takes fewer at a time where more
            would not fit its cache. The results themselves are up to eight tables of ``S`` times ``N`` numbers beside.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second. It counts rounds, which may end
            early.

    Returns:
        The gaps with their standard errors, by row and in total.

    Raises:
        ValueError: if a density is no number, or zero at a draw, the rows are not all of a data set, the guide misses a
            latent, the latents are not in one plate, rows share a factor, or the richer family has weights that rows share.
        TypeError: if the guide is none of the three.

    References:
        Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders", 2018,
        https://arxiv.org/abs/1801.03558.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> gaps = avi.measure_gaps(model, guide, x, num_samples=50, num_steps=20, max_rounds=2)
        >>> gaps.amortization.rows.shape
        torch.Size([20])
    """
    _check(num_samples, num_steps, max_rounds, annealing, reverse)
    seed = as_seed(seed)
    held, guide = hold_globals(model, guide, theta, args, kwargs, seed=seed)
    measured = _Measurement(held, guide.row_plates, args, kwargs, num_samples, seed, max_memory)
    own = measured.table_of(guide)
    source, report = measured.weight_source(own), Draws(num_samples, seed)
    weights = source.weights(own, report)
    exact = exact_evidence(held, args, evidence, weights.local.shape[1])
    # Rows whose density is no number are named here, before the work.
    tails = khat(weights)
    _check_bounded(weights, "the guide")
    budget = Budget(num_steps, lr, max_rounds, tolerance)
    with torch.no_grad():
        tables = read_tables(own)
        mean = {name: table.mean(0) for name, table in tables.items()}
        initial = {
            name: row_factor.factor.initial(1.0).flatten(0, -2)
            for name, row_factor in zip(tables, own.row_factors, strict=True)
        }
    with progress_bar(0, unit="round", progress=progress) as bar:
        search = FactorSearch(held, source, args, kwargs, budget=budget, seed=seed + _STEPS, report=report, bar=bar)
        found = search.improve(own, weights, [tables, mean, initial, *starts])
        of_best = of_bound = found.weights
        converged = found.converged
        if richer is not None:
            flexible = measured.richer(richer, own)
            with_richer = search.improve(flexible, of_best, [read_tables(flexible)])
            of_bound, converged = with_richer.weights, converged & with_richer.converged
    others = [] if exact is not None else measured.other_weights(source, own, found.ends, initial)
    if annealing is not None:
        others.append(measured.chains(own, annealing))
    known = Evidence(exact, of_bound, others)
    upper = None if reverse is None or annealing is None else measured.chains(own, annealing, reverse)
    one, two, three = weights.local, of_best.local, of_bound.local
    approximation = known.above(two)
    return Gaps(
        inference=known.above(one),
        approximation=approximation
        if found.remaining is None
        else with_refinement_error(approximation, found.remaining, weights.scale),
        amortization=paired_mean(two - one, weights.scale),
        richer=None if richer is None else paired_mean(three - two, weights.scale),
        elbo=paired_mean(one, weights.scale),
        evidence=known.above(torch.zeros_like(one)),
        slack=known.slack(upper),
        exact=exact is not None,
        converged=converged,
        unreliable=known.unreliable,
        khat=tails,
    )


class _Measurement:
    """What gaps are measured by: tables of factors for the rows of a call, and sources of their log weights.

    Args:
        model: without global latents.
        plates: of the rows.
        args, kwargs: of the model.
        num_samples: the draws by which a factor is measured.
        seed: of these draws.
        max_memory: as in :func:`measure_gaps`.
    """

    def __init__(self, model, plates, args, kwargs, num_samples, seed, max_memory):
        self._model, self._plates, self._args, self._kwargs = model, plates, args, kwargs
        self._num_samples, self._seed, self._max_memory = num_samples, seed, max_memory

    def table_of(self, guide: LocalGuide) -> FactorizedGuide:
        """A guide with a table for the rows that holds the outputs of another guide."""
        result = table_like(self._model, guide, self._args, self._kwargs)
        given = guide.variational_parameters(*self._args, **self._kwargs)
        tables = {}
        for (name, table), row_factor in zip(result.row_tables().items(), result.row_factors, strict=True):
            rows = given[row_factor.row_set.plates] if isinstance(given, dict) else given
            if rows.numel() != table.numel():
                raise ValueError(
                    f"Expected all rows of a data set, got {len(rows)} of {len(table)}.\n"
                    "Pass them as a data set of their own, without positions."
                )
            tables[name] = rows.reshape(table.shape)
        write_tables(result, tables)
        return result

    def weight_source(self, guide: FactorizedGuide) -> WeightSource:
        """The source of the log weights of the rows' factors."""
        with isolated_sampling(self._seed):
            return weight_source(self._model, guide, self._args, self._kwargs, max_memory=self._max_memory)

    def richer(self, family: Family, best: FactorizedGuide) -> FactorizedGuide:
        """A table of a richer family that starts with the moments of the best factors."""
        return richer_table(self._model, best, self._args, self._kwargs, family=family, seed=self._seed + _MOMENTS)

    def other_weights(
        self, source: WeightSource, best: FactorizedGuide, ends: Sequence[Tables], wide: Tables
    ) -> list[LogWeights]:
        """Weights by which mass shows that the best factors do not cover: of draws from a mixture of them, of where the search
        has ended elsewhere, and of the prior; where no mixture has weights by row, of draws from wide factors."""
        return self._mixture_weights(source, best, ends) or self._wide_weights(source, best, wide)

    def _wide_weights(self, source: WeightSource, best: FactorizedGuide, wide: Tables) -> list[LogWeights]:
        tables = read_tables(best)
        write_tables(best, {name: table.expand_as(tables[name]) for name, table in wide.items()})
        weights = source.weights(best, Draws(max(self._num_samples, _WIDE), self._seed + _MIXTURE))
        write_tables(best, tables)
        # Far away a density may be zero or no number.
        return [weights] if weights.local.isfinite().all() else []

    def _mixture_weights(self, source: WeightSource, best: FactorizedGuide, ends: Sequence[Tables]) -> list[LogWeights]:
        factor = best.row_factors[0].factor
        # Rows that share observations, or are of several sets, have no log weights of their own.
        alone = len(best.row_plates) == len(best.row_factors) == 1 and source.blocks is None
        if not alone or all(latent.num_values is not None for latent in factor.latents):
            return []
        with isolated_sampling(self._seed + _MIXTURE), torch.no_grad():
            # The discrete latents are summed out.
            joint = source.joint if isinstance(source, JointWeights) else self._joint_of_continuous()
            if joint is None:
                return []
            tables = [best.row_factors[0].function.table, *(table for end in ends for table in end.values())]
            factors = [factor.distribution(table) for table in tables]
            count = max(self._num_samples // 4, _MIXED)
            return [mixture_weights(joint, factors, num_samples=count, max_memory=self._max_memory)]

    def _joint_of_continuous(self) -> LocalJoint | None:
        """The joint of the continuous latents; ``None`` where the model cannot be run for all values of the others."""
        try:
            model = config_enumerate(self._model, "parallel")
            return LocalJoint(model, self._args, self._kwargs, plate=self._plates[0])
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError):
            return None

    def chains(self, guide: FactorizedGuide, annealing: Annealing, reverse=None) -> LogWeights:
        """The weights of annealed importance sampling that starts from a table's factors."""
        with isolated_sampling(self._seed + _CHAINS):
            return annealed_weights(
                LocalJoint(self._model, self._args, self._kwargs, plate=guide.row_plate()),
                guide.fixed_posterior(*self._args, **self._kwargs),
                **annealing,
                reverse=reverse,
                max_memory=self._max_memory,
            )


def _check_bounded(weights: LogWeights, whose: str) -> None:
    """Raise an error for draws of zero density: their bound is minus infinity, and differences are not defined."""
    rows = (weights.local == -torch.inf).any(0).nonzero().flatten().tolist()
    if rows:
        raise ValueError(
            f"Expected a density above zero at every draw of {whose}, got zero in rows {rows[:10]} ({len(rows)} of "
            f"{weights.local.shape[1]}): their ELBO is minus infinity.\n"
            "State the support of the latents in the model, by a prior with that support."
        )


def _check(num_samples: int, num_steps: int, max_rounds: int, annealing, reverse) -> None:
    for name, number, least in (
        ("num_samples", num_samples, 25),
        ("num_steps", num_steps, 1),
        ("max_rounds", max_rounds, 1),
    ):
        check_count(name, number, least)
    needed = {"num_chains", "num_temperatures", "num_leapfrog"}
    if annealing is not None and not needed <= set(annealing) <= needed | {"start"}:
        raise ValueError(f"Expected annealing= with {sorted(needed)} and perhaps start, got {sorted(annealing)}.")
    if annealing is not None and annealing["num_chains"] < 25:
        raise ValueError(
            f"Expected num_chains of at least 25, by which rows are judged, got {annealing['num_chains']}."
        )
    if reverse is not None and annealing is None:
        raise ValueError("Expected annealing= with the budget of the reverse run, got none.")
