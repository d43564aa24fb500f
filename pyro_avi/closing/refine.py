"""Closing the gap of given rows: a factorized guide from another guide's output."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pyro_avi.closing.row_tables import Tables, choose, read_tables, table_like, write_tables
from pyro_avi.closing.take_steps import take_steps
from pyro_avi.closing.until_converged import refine_until_converged
from pyro_avi.closing.weight_source import Draws, weight_source
from pyro_avi.estimators.gains import gains
from pyro_avi.evidence.one_row import as_one_row, write_back
from pyro_avi.guide_bases.local_guide import LocalGuide, check_local_guide
from pyro_avi.guides import FactorizedGuide
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed
from pyro_avi.training.fit import LearningRate

__all__ = ["refine"]

# Draws by which start and end of a row are compared; fewer where it is known about how much they may differ.
_DRAWS, _FEWER_DRAWS = 100, 40


@in_turn
def refine(
    model: Callable,
    guide: LocalGuide,
    *args,
    num_steps: int,
    lr: LearningRate = 0.2,
    start: Tensor | dict[tuple[str, ...], Tensor] | None = None,
    tolerance: float | None = None,
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
        tolerance: in nats, to take steps of those rows only that may still gain as much, and at most ``num_steps`` of each.
            After the last step, half of the steps, a quarter and so on (at least five) the gradients of the steps tell what
            is left, and rows of which that is less at a confidence of 95 % are done; those that were near their best factors
            from the first keep them. Where the model can be called for some rows (tensors among the arguments whose first
            dimension has the size of the plate are cut, and the log joint of that call is compared with that of all) only
            those not done are evaluated further, otherwise all until all are done. ``refinement`` of the result tells the
            steps of each row, what is left and whether it has converged.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        A guide for these rows, with a copy of the guide's factor of the global latents. ``guide`` and ``model`` are left
        as they are.

    Raises:
        ValueError: if the guide has not been set up, or is for other latents, or the start has not a row for each row to
            refine; if the tolerance is not positive, or the family has no formula of its Fisher information.

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
    _check_tolerance(tolerance)
    seed = as_seed(seed)
    options: dict[str, Any] = {"num_steps": num_steps, "lr": lr, "progress": progress}
    if not guide.row_plates:
        row, table = as_one_row(model, guide, args, kwargs)
        refined = refine(row, table, *args, start=start, tolerance=tolerance, seed=seed, **options, **kwargs)
        result = write_back(model, refined, args, kwargs)
        result.refinement = refined.refinement
        return result
    refined = table_like(model, guide, args, kwargs, with_globals=True)
    starts = _starts(guide, refined, start, args, kwargs)
    write_tables(refined, starts)
    # Another seed than that of the steps: rows are overfitted to the draws that they were trained on.
    draws = Draws(_DRAWS if tolerance is None else _FEWER_DRAWS, seed + 1)
    if tolerance is not None:
        refine_until_converged(model, refined, args, kwargs, tolerance=tolerance, draws=draws, seed=seed, **options)
        return refined
    source = weight_source(model, refined, args, kwargs)
    before = source.weights(refined, draws).local
    take_steps(model, refined, args, kwargs, seed=seed, **options)
    gained = gains(before, source.weights(refined, draws).local).significant()
    write_tables(refined, choose(gained, read_tables(refined), starts, source.blocks))
    return refined


def _check_tolerance(tolerance: Any) -> None:
    is_number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
    if tolerance is not None and not (is_number and 0 < float(tolerance) < math.inf):
        raise ValueError(
            f"Expected tolerance to be a positive number of nats, got {tolerance!r}.\n"
            "Leave it out to take num_steps steps of all rows."
        )


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
