"""Closing the gap of given rows: a factorized guide from another guide's output."""

import copy
import warnings
from collections.abc import Callable, Mapping

import torch
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor

from pyro_avi.families import Flow, RowFlow
from pyro_avi.fit import Fit, LearningRate, fit
from pyro_avi.guides import FactorizedGuide
from pyro_avi.guides.guide import LocalGuide
from pyro_avi.sticking_the_landing import StickingTheLandingELBO
from pyro_avi.structure import quiet
from pyro_avi.turns import in_turn
from pyro_avi.weights import log_weights

__all__ = ["check_latents", "refine"]


@in_turn
def refine(
    model: Callable,
    guide: LocalGuide,
    *args,
    num_steps: int,
    lr: LearningRate = 0.05,
    start: Tensor | dict[tuple[str, ...], Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
    **kwargs,
) -> FactorizedGuide:
    r"""Fit a factor of its own to every row of a call, globals and model frozen.

    .. math:: \lambda_n \leftarrow \arg\max_\lambda E_{q_0(\theta)} \left[ \mathrm{ELBO}_n(\lambda, \theta) \right],
              \qquad \text{started at } f(n, x_n)

    What the rows gain is their amortization gap, or a lower bound on it after too few steps: a row that its steps made worse
    keeps its start, so that no row loses. It is also how a factorized guide answers for held-out rows.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides.
        *args, **kwargs: the model's arguments for the rows to refine, all rows of a data set: for held-out rows the model
            must take another number of rows than it was trained on.
        num_steps: the number of steps of row-wise Adam, each over all rows. The result is the mean of the tables after each
            step of the second half: what one draw a step leaves of noise in a table mostly cancels in it. After a
            quarter of the steps the gradient is that of the path alone, see :class:`~pyro_avi.StickingTheLandingELBO`.
        lr: the learning rate, a number or a function of the step from 0.
        start: ``[N, P]`` where to start, for several row sets by the names of their plates; by default the guide's own
            output for the rows. A factorized guide has none for rows that it was not fitted to: they start at the mean of
            its table, its best constant guess.
        seed: of the draws.
        progress: whether to show a progress bar.

    Returns:
        A guide for these rows, with a copy of the guide's factor of the global latents. ``guide`` and ``model`` are left
        as they are.

    Raises:
        ValueError: if the guide has not been set up, or is for other latents, or the start has not a row for each row to
            refine.

    References:
        Kim, Wiseman, Miller, Sontag and Rush, "Semi-Amortized Variational Autoencoders", 2018,
        https://arxiv.org/abs/1802.02550. Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992,
        https://doi.org/10.1137/0330046.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> avi.refine(model, guide, x[:5], num_steps=3).table.shape
        torch.Size([5, 4])
    """
    global_guide = copy.deepcopy(guide.global_guide)
    refined = FactorizedGuide(
        model, plate=guide.row_plates, family=guide.family, global_guide=global_guide, same_rows=True
    )
    refined.setup(*args, **kwargs)
    check_latents(refined, guide)
    tables = refined.row_tables()
    with torch.no_grad():
        for of, theirs in zip(refined.row_factors, guide.row_factors, strict=True):
            # What rows share in a family is the model of their factors: it is taken over, and frozen with the globals.
            of.factor.load_state_dict(theirs.factor.state_dict())
        starts = _starts(guide, refined, start, args, kwargs)
        for name, table in tables.items():
            table.copy_(starts[name])
    mean = _MeanOfTables(tables, first=num_steps // 2 + 1)
    landing = _Landing(refined, num_steps // 4)
    # By the tables alone: weights that the rows share would tie them together.
    shared = [parameter for of in refined.row_factors for parameter in of.factor.parameters()]
    # In evaluation mode, where Pyro does not wonder about parameters that need no gradient.
    refined.row_factors.eval()
    for parameter in shared:
        parameter.requires_grad_(False)
    options = {"elbo": landing.elbo, "seed": seed, "progress": progress, "callbacks": [mean, landing]}
    with warnings.catch_warnings():
        # Global latents that the model states after local ones: frozen, they only add a constant.
        warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
        fit(model, refined, *args, num_steps=num_steps, lr={"local": lr}, **options, **kwargs)
    for parameter in shared:
        parameter.requires_grad_(True)
    mean.take()
    refined.row_factors.train()
    # To judge a row is not to cost more than to move it.
    _take_back(model, refined, starts, args, kwargs, seed, draws=min(20, num_steps))
    return refined


def check_latents(mine: LocalGuide, theirs: LocalGuide) -> None:
    """Refuse another guide that misses latents of the rows, or has more of them.

    Args:
        mine: the guide made for a model.
        theirs: the guide given with that model.
    """
    needed, given = (
        [sorted(latent.name for latent in of.rows.latents) for of in guide.row_factors] for guide in (mine, theirs)
    )
    if needed != given:
        raise ValueError(
            f"Expected a guide for the latents {needed} of the model's rows, got one for {given}.\n"
            "Pass the model that the guide was made for."
        )


class _MeanOfTables:
    """The mean of tables over the steps of a training from one on; a callback of it.

    Args:
        tables: by name.
        first: the number of the first step to count, from 1.
    """

    def __init__(self, tables: Mapping[str, Tensor], *, first: int):
        self._tables, self._first, self._count = tables, first, 0
        self._sums = {name: torch.zeros_like(table) for name, table in tables.items()}

    @torch.no_grad()
    def __call__(self, course: Fit) -> None:
        if course.steps >= self._first:
            self._count += 1
            for name, table in self._tables.items():
                self._sums[name] += table

    @torch.no_grad()
    def take(self) -> None:
        """Write the means into the tables."""
        for name, table in self._tables.items():
            table.copy_(self._sums[name] / self._count)


class _Landing:
    """The loss of a refinement: near the optimum, from one of its steps on, with the gradient of the path alone.

    Far from there its noise can be large, and exact entropies do better.
    """

    def __init__(self, guide: FactorizedGuide, start: int):
        self._start, self._weight = start, torch.full((1,), float(start == 0))
        discrete = any(latent.num_values is not None for of in guide.row_factors for latent in of.rows.latents)
        if discrete or isinstance(guide.family, Flow | RowFlow):
            # Closed-form divergences, where there are any. The path alone would take a flow's inverse.
            self.elbo: ELBO = TraceMeanField_ELBO()
        else:
            self.elbo = StickingTheLandingELBO(weight=self._weight)

    def __call__(self, course: Fit) -> None:
        if course.steps == self._start:
            self._weight.fill_(1.0)


def _starts(guide: LocalGuide, refined: FactorizedGuide, start, args, kwargs) -> dict[str, Tensor]:
    """The tables' first values by name, ``[N, P]``."""
    if start is None:
        own = isinstance(guide, FactorizedGuide)
        start = guide.table if own else guide.variational_parameters(*args, **kwargs)
        if own:
            start = {key: table.mean(0) for key, table in start.items()} if isinstance(start, dict) else start.mean(0)
    starts = {}
    for (name, table), of in zip(refined.row_tables().items(), refined.row_factors, strict=True):
        given = start[of.rows.plates] if isinstance(start, dict) else start
        if given.shape not in (table.shape, table.shape[1:], (*of.function.sizes, table.shape[1])):
            raise ValueError(
                f"Expected start of shape {tuple(table.shape)}, one row for each row to refine, got {tuple(given.shape)}."
            )
        # A table may be in host memory.
        given = given.to(table.device)
        starts[name] = (given.flatten(0, -2) if given.dim() > 1 else given).expand_as(table).clone()
    return starts


def _take_back(
    model, refined: FactorizedGuide, starts: dict[str, Tensor], args, kwargs, seed: int, *, draws: int
) -> None:
    """Give back its start to every row that the steps made worse, judged by the same draws for both."""
    tables = refined.row_tables()
    plate = refined.row_plates[0]

    def bounds() -> Tensor:
        # Not the seed of the steps: rows fit the very draws that they were trained on.
        with quiet(seed + 1):
            weights = log_weights(model, refined, *args, num_samples=draws, plate=plate, **kwargs)
            # Rows of crossed plates share their observations, and are judged together.
            alone = len(refined.row_plates) == 1
            return weights.local.mean(0) if alone else weights.total.mean(0, keepdim=True)

    after, steps = bounds(), {name: table.detach().clone() for name, table in tables.items()}
    with torch.no_grad():
        for name, table in tables.items():
            table.copy_(starts[name])
        # Rows whose bound is no number are worse too.
        worse = ~(after >= bounds())
        for name, table in tables.items():
            table.copy_(torch.where(worse.unsqueeze(-1), starts[name], steps[name]))
