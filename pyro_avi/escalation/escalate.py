"""Answers for rows, each by the first method that is good enough for it."""

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.escalation.ladder import Budget, Ladder
from pyro_avi.escalation.results import Escalation
from pyro_avi.escalation.weighing import LEAST_DRAWS, Need
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.evidence.hold_globals import Theta, hold_globals
from pyro_avi.families import Family, MultivariateNormal
from pyro_avi.guide_bases.local_guide import LocalGuide, check_local_guide
from pyro_avi.lock import in_turn
from pyro_avi.seeds import as_seed

__all__ = ["escalate"]

_FULL = MultivariateNormal()


@in_turn
@evaluation_mode()
def escalate(
    model: Callable,
    guide: LocalGuide,
    *args,
    tolerance: float = 0.01,
    num_samples: int = 1000,
    min_ess: int = 100,
    num_steps: int = 100,
    lr: float = 0.2,
    richer: Family | None = _FULL,
    max_nuts: int = 10,
    num_warmup: int = 300,
    num_chains: int = 2,
    theta: Theta = "mean",
    max_memory: int = 2**30,
    seed: int | None = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    **kwargs,
) -> Escalation:
    r"""Draw from the posterior of every row, each by the first of five methods that is good enough for it.

    1. **Amortized**: draws from the guide, where :math:`\log p(x_n) - \mathrm{ELBO}_n`, the divergence of its factor from the
       posterior, is at most ``tolerance`` at a confidence of 95 %.
    2. **Weighted**: the same draws by their importance weights, where these have ``min_ess`` effective draws, and the bound of
       the weighed draws lacks at most ``tolerance`` of the evidence.
    3. **Refined**: draws, as they are or by their weights, from a factor of the row's own, after ``num_steps`` steps of
       :func:`~pyro_avi.refine`.
    4. **Richer**: the same from a factor of a richer family, started with the moments of the refined one.
    5. **NUTS**: chains on the log joint of the row, in coordinates in which its last factor is a standard normal, and started
       from draws of that; where they have mixed (split R-hat at most 1.05) and have ``min_ess`` effective draws.

    Weights are trusted if their k-hat is below its threshold (:func:`~pyro_avi.khat`), or nine in ten draws are effective.
    Only as many draws of a row are weighed as it takes: 25 first, and then four times as many as long as more of them can
    still make the answer good enough.
    What a level is not good enough for goes on to the next, and only these rows are paid for: the arguments are cut to them
    where a log joint of the cut call is found to be the same; otherwise all rows are evaluated, and the others left as they
    are. No weight knows of a mode that no draw has met: look for these by :func:`~pyro_avi.measure_gaps`.

    Args:
        model: the model that the guide was made for.
        guide: any of the three guides. On held-out rows a factorized guide has to be refined first.
        *args, **kwargs: the arguments of the model for the rows to answer, all rows of a data set: for held-out rows the
            model must take another number of rows than it was trained on.
        tolerance: how far from the posterior the answer of a row may be, in nats.
        num_samples: ``S``, the draws of every row, at least 25.
        min_ess: the effective draws that weights and chains need, at most ``num_samples``.
        num_steps: the steps of the refined and of the richer factors.
        lr: the learning rate of these, see :func:`~pyro_avi.refine`.
        richer: the family of the fourth level, whose parameters are the row's own, for example :class:`~pyro_avi.RowFlow`;
            ``None`` to leave it out, as is a family that is the guide's.
        max_nuts: the most rows that chains are run for, those with the fewest effective draws; 0 for none. A row takes
            thousands of gradients of its log joint, one after the other: seconds to minutes.
        num_warmup: the steps of each chain before its draws.
        num_chains: the chains of a row, at least 2; they have ``num_samples`` draws together.
        theta: what the global latents are held at: ``"mean"`` of the guide's factor in unconstrained coordinates,
            ``"draw"`` for one from it, or values by site. Draws and evidences are those given these.
        max_memory: in bytes, what the draws that are evaluated at a time may take.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        device: of the result, by default main memory.
        progress: whether to show a progress bar, which appears after the first second. It counts rows that are done.

    Returns:
        Weighted draws by site for every row, how each was answered, how reliable that is, and what it cost.

    Raises:
        ValueError: if the tolerance is not positive, there are fewer draws than asked for, the model has no rows, discrete
            latents, latents in several plates or rows that a factor ties, or a density is no number.
        TypeError: if the guide is none of the three, or a count is no whole number.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", 2024,
        https://arxiv.org/abs/1507.02646. Domke and Sheldon, "Importance weighting and variational inference", 2018,
        https://arxiv.org/abs/1808.09034.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> answer = avi.escalate(model, guide, x, num_samples=200)
        >>> answer.draws["z"].shape, answer.weights.shape, bool(answer.met.all())
        (torch.Size([200, 20, 2]), torch.Size([200, 20]), True)
    """
    _check_options(tolerance, num_samples, min_ess, num_steps, max_nuts, num_warmup, num_chains)
    check_local_guide(guide)
    guide.setup(*args, **kwargs)
    _check_latents(guide)
    seed = as_seed(seed)
    held, guide = hold_globals(model, guide, theta, args, kwargs, seed=seed)
    need = Need(tolerance, num_samples, min_ess)
    budget = Budget(need, num_steps, lr, richer, max_nuts, num_warmup, num_chains, max_memory)
    with progress_bar(None, unit="row", progress=progress) as bar:
        answer = Ladder(held, guide, args, kwargs, budget=budget, seed=seed, bar=bar).climb()
    tensors: dict[str, Any] = {
        name: value.to(device) for name, value in vars(answer).items() if isinstance(value, torch.Tensor)
    }
    return replace(answer, draws={name: value.to(device) for name, value in answer.draws.items()}, **tensors)


def _check_options(tolerance, num_samples, min_ess, num_steps, max_nuts, num_warmup, num_chains) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"Expected tolerance= to be a number of nats, got {tolerance!r}.")
    if not 0 < float(tolerance) < math.inf:
        raise ValueError(
            f"Expected tolerance= to be a positive number of nats, got {tolerance}.\n"
            "No method reaches the posterior itself: a hundredth of a nat is hardly seen in any summary."
        )
    for name, count, least in (
        ("num_samples", num_samples, LEAST_DRAWS),
        ("min_ess", min_ess, 1),
        ("num_steps", num_steps, 1),
        ("max_nuts", max_nuts, 0),
        ("num_warmup", num_warmup, 1),
        ("num_chains", num_chains, 2),
    ):
        check_count(name, count, least)
    if min_ess > num_samples:
        raise ValueError(
            f"Expected min_ess of at most num_samples={num_samples}, got {min_ess}: no row has more effective draws than draws."
        )


def _check_latents(guide: LocalGuide) -> None:
    """Raise an error for latents that not all levels can answer for."""
    if not guide.row_plates:
        raise ValueError(
            "Expected a model with latents in a plate of rows, got one whose latents are all global.\n"
            "Sample them by pyro.infer.NUTS, or pass the plate of the rows to the guide: plate=..."
        )
    sets = [row_factor.row_set for row_factor in guide.row_factors]
    if len(sets) != 1 or len(sets[0].plates) != 1:
        raise ValueError(
            f"Expected latents in one plate of rows, got {[' x '.join(each.plates) for each in sets]}.\n"
            "Rows of several plates share observations, and have no posteriors of their own. avi.refine takes them."
        )
    discrete = [latent.name for latent in sets[0].latents if latent.num_values is not None]
    if discrete:
        raise ValueError(
            f"Expected continuous latents, got the discrete {discrete}, which no chain of NUTS can move.\n"
            "Sum them out in the model, or close their gap by avi.refine."
        )
