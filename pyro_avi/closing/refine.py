"""Closing the gap of given rows: a factorized guide from another guide's output."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.optim import Adam, Optimizer

from pyro_avi.closing.natural_steps import NaturalSteps
from pyro_avi.closing.row_tables import Tables, choose, read_tables, table_like, write_tables
from pyro_avi.closing.weight_source import Draws, weight_source
from pyro_avi.elbos.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.estimators.gains import gains
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.evidence.enumerated import Enumerated, enumerating_elbo
from pyro_avi.evidence.one_row import as_one_row, write_back
from pyro_avi.guide_bases.local_guide import LocalGuide, check_local_guide
from pyro_avi.guides import FactorizedGuide
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed
from pyro_avi.training.fit import Fit, LearningRate, fit

__all__ = ["refine", "take_steps"]

# Draws by which start and end of a row are compared, and those of a step.
_DRAWS, _PARTICLES = 100, 2
# Adam's rate for a share of the natural gradient: 0.05 where the share is 0.2.
_OF_ADAM = 0.25


@in_turn
def refine(
    model: Callable,
    guide: LocalGuide,
    *args,
    num_steps: int,
    lr: LearningRate = 0.2,
    start: Tensor | dict[tuple[str, ...], Tensor] | None = None,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> FactorizedGuide:
    r"""Fit a factor of its own to every row of a call, globals and model frozen.

    .. math:: \lambda_n \leftarrow \arg\max_\lambda E_{q_0(\theta)} \left[ \mathrm{ELBO}_n(\lambda, \theta) \right],
              \qquad \text{started at } f(n, x_n)

    What the rows gain is their amortization gap, or a lower bound on it after too few steps. Start and end of every row are
    compared by the same fresh draws, and a row whose gain is not significant keeps its start, so that no row loses: of the
    rows that move, one in twenty may not have gained, in expectation. It is also how a factorized guide answers for held-out
    rows.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides.
        *args, **kwargs: the model's arguments for the rows to refine, all rows of a data set: for held-out rows the model
            must take another number of rows than it was trained on.
        num_steps: the number of steps, each over all rows by two draws: along the natural gradient, by the diagonal of the
            Fisher information of the row's factor, and by the path alone (:class:`~pyro_avi.StickingTheLandingELBO`). The
            result is the mean of the tables after each step of the second half: what few draws a step leave of noise in a
            table mostly cancels in it.
        lr: the share of the natural gradient that a step goes, a number or a function of the step from 0. A parameter moves
            by its factor's own scale at most: a location of a normal by a standard deviation. Families without a formula of
            their Fisher information (flows, :class:`~pyro_avi.LowRankNormal`, :class:`~pyro_avi.MarkovNormal`) are moved by
            Adam, at a quarter of the rate.
        start: ``[N, P]`` where to start, for several row sets by the names of their plates; by default the guide's own
            output for the rows, of a factorized guide the rows of its table. It has none for rows that it was not fitted to:
            they start at the mean of its table, its best constant guess.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        A guide for these rows, with a copy of the guide's factor of the global latents. ``guide`` and ``model`` are left
        as they are.

    Raises:
        ValueError: if the guide has not been set up, or is for other latents, or the start has not a row for each row to
            refine.

    References:
        Kim, Wiseman, Miller, Sontag and Rush, "Semi-Amortized Variational Autoencoders", 2018,
        https://arxiv.org/abs/1802.02550. Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
        https://doi.org/10.1137/0330046. Amari, "Natural gradient works efficiently in learning", 1998,
        https://doi.org/10.1162/089976698300017746.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> avi.refine(model, guide, x[:5], num_steps=3).table.shape
        torch.Size([5, 4])
    """
    check_local_guide(guide)
    seed = as_seed(seed)
    if not guide.row_plates:
        row, table = as_one_row(model, guide, args, kwargs)
        refined = refine(
            row, table, *args, num_steps=num_steps, lr=lr, start=start, seed=seed, progress=progress, **kwargs
        )
        return write_back(model, refined, args, kwargs)
    refined = table_like(model, guide, args, kwargs, with_globals=True)
    starts = _starts(guide, refined, start, args, kwargs)
    write_tables(refined, starts)
    source, draws = weight_source(model, refined, args, kwargs), Draws(_DRAWS, seed + 1)
    # Another seed than that of the steps: rows are overfitted to the draws that they were trained on.
    before = source.weights(refined, draws).local
    take_steps(model, refined, args, kwargs, num_steps=num_steps, lr=lr, seed=seed, progress=progress)
    gained = gains(before, source.weights(refined, draws).local).significant()
    write_tables(refined, choose(gained, read_tables(refined), starts, source.blocks))
    return refined


def take_steps(
    model: Callable,
    guide: FactorizedGuide,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_steps: int,
    lr: LearningRate,
    seed: int,
    progress: bool = False,
    shares: Mapping[str, Tensor] | None = None,
) -> None:
    """Move the tables of a guide from where they are to the mean of the second half of the steps, and nothing else.

    Args:
        model, guide: the guide is made for the model.
        args, kwargs: the arguments of both.
        num_steps, lr, seed, progress: as in :func:`refine`.
        shares: by the name of the table ``[N, 1]``, which share of the learning rate a row moves by; 1 by default.
    """
    tables = guide.row_tables()
    mean = _MeanOfTables(tables, first=num_steps // 2 + 1)
    summed = enumerating_elbo(model, guide, args, kwargs)
    trained, elbo = (guide, _loss(guide)) if summed is None else (Enumerated(guide), summed)
    scaled = [] if shares is None else [_ScaledRates(tables, shares)]
    optimizer, rate = _optimizer(guide, lr)
    # Only the tables are trained: shared weights would make the rows depend on one another.
    shared = [parameter for row_factor in guide.row_factors for parameter in row_factor.factor.parameters()]
    # In evaluation mode, in which Pyro does not warn about parameters without a gradient.
    guide.row_factors.eval()
    for parameter in shared:
        parameter.requires_grad_(False)
    callbacks: list[Callable[[Fit], None]] = [*scaled, mean]
    with warnings.catch_warnings(), evaluation_mode():
        # The warning is about global latents after local ones in the model; frozen, they only add a constant.
        warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
        fit(
            model,
            trained,
            *args,
            num_steps=num_steps,
            lr={"local": rate},
            optimizer=optimizer,
            elbo=elbo,
            callbacks=callbacks,
            seed=seed,
            progress=progress,
            **kwargs,
        )
    for parameter in shared:
        parameter.requires_grad_(True)
    mean.take()
    guide.row_factors.train()


def _optimizer(guide: FactorizedGuide, lr: LearningRate) -> tuple[Callable[..., Optimizer], LearningRate]:
    """What moves the tables of a guide, and at which rate."""
    tables = {row_factor.function.table: row_factor.factor.fisher for row_factor in guide.row_factors}
    if all(fisher(table) is not None for table, fisher in tables.items()):
        known = cast(dict[int, Callable[[Tensor], Tensor]], {id(table): fisher for table, fisher in tables.items()})
        return partial(NaturalSteps, fisher=known), lr
    return Adam, (lambda step: _OF_ADAM * lr(step)) if callable(lr) else _OF_ADAM * lr


class _MeanOfTables:
    """The mean of tables over the steps of a training from one on; a callback of it.

    Args:
        tables: by name.
        first: the number of the first step to count, from 1.
    """

    def __init__(self, tables: Tables, *, first: int):
        self._tables, self._first, self._count = tables, first, 0
        self._sums = {name: torch.zeros_like(table) for name, table in tables.items()}

    @torch.no_grad()
    def __call__(self, training: Fit) -> None:
        if training.steps >= self._first:
            self._count += 1
            for name, table in self._tables.items():
                self._sums[name] += table

    @torch.no_grad()
    def take(self) -> None:
        """Write the means into the tables."""
        for name, table in self._tables.items():
            table.copy_(self._sums[name] / self._count)


class _ScaledRates:
    """Rows that move by a share of the learning rate; a callback of a training.

    What a step moves a row by is proportional to the rate, so that a share of the move is the move at a share of the rate.

    Args:
        tables: by name.
        shares: ``[N, 1]`` by name.
    """

    def __init__(self, tables: Tables, shares: Mapping[str, Tensor]):
        self._tables, self._shares = tables, shares
        self._last = {name: table.detach().clone() for name, table in tables.items()}

    @torch.no_grad()
    def __call__(self, training: Fit) -> None:
        for name, table in self._tables.items():
            table.copy_(torch.lerp(self._last[name], table, self._shares[name].to(table)))
            self._last[name].copy_(table)


def _loss(guide: FactorizedGuide) -> ELBO:
    """The loss of a refinement: where there is one, by the gradient of the path alone, which has no noise at the posterior."""
    discrete = any(
        latent.num_values is not None for row_factor in guide.row_factors for latent in row_factor.row_set.latents
    )
    # The gradient of the path alone needs the inverse of a flow.
    by_path = guide.family.cheap_density or discrete
    return (StickingTheLandingELBO if by_path else TraceMeanField_ELBO)(num_particles=_PARTICLES)


def _starts(guide: LocalGuide, refined: FactorizedGuide, start, args, kwargs) -> Tables:
    """The tables' first values by name, ``[N, P]``."""
    own = start is None
    if own and _has_output_for(guide, args, kwargs):
        with torch.no_grad():
            start = guide.variational_parameters(*args, **kwargs)
    elif own:
        tables = guide.table
        start = {key: table.mean(0) for key, table in tables.items()} if isinstance(tables, dict) else tables.mean(0)
    with torch.no_grad():
        asked = refined.variational_parameters(*args, **kwargs)
    starts = {}
    for (name, table), row_factor in zip(refined.row_tables().items(), refined.row_factors, strict=True):
        rows = (asked[row_factor.row_set.plates] if isinstance(asked, dict) else asked).shape[:-1]
        if tuple(rows) != row_factor.function.sizes:
            raise ValueError(
                f"Expected all {len(table)} rows of {name!r}, got {rows.numel()} of them.\n"
                "Pass the rows to refine as a data set of their own, without positions."
            )
        given = start[row_factor.row_set.plates] if isinstance(start, dict) else start
        if given.shape not in (table.shape, table.shape[1:], (*row_factor.function.sizes, table.shape[1])):
            raise ValueError(
                f"Expected start of shape {tuple(table.shape)}, one row for each row to refine, got {tuple(given.shape)}."
            )
        # A table may be in host memory.
        given = given.to(table.device)
        starts[name] = (given.detach().flatten(0, -2) if given.dim() > 1 else given.detach()).expand_as(table).clone()
    return starts


def _has_output_for(guide: LocalGuide, args, kwargs) -> bool:
    """Whether a guide has an output for the rows of a call: a table only for those that it was fitted to."""
    if not isinstance(guide, FactorizedGuide):
        return True
    try:
        guide.check_rows(*args, **kwargs)
    except ValueError:
        return False
    return True
