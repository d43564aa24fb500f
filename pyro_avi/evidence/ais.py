"""Annealed importance sampling of a model's evidence, row by row."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TypedDict

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.densities.log_weights import LogWeights
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.estimators import Estimate, iwelbo
from pyro_avi.estimators.ais import anneal, pilot, temperatures
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.evidence.hold_globals import Theta, hold_globals
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.lock import in_turn
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import as_seed, seeded

__all__ = ["Annealing", "ais", "annealed_weights", "isolated_sampling"]

# The number of chains of the pilot run that finds the step sizes of a row.
_PILOT_CHAINS = 16


class _Chains(TypedDict):
    num_chains: int
    num_temperatures: int
    num_leapfrog: int


class Annealing(_Chains, total=False):
    """Options of annealed importance sampling, as those of :func:`~pyro_avi.ais`; ``start`` may be left out."""

    start: str


@in_turn
def ais(
    model: Callable,
    guide: LocalGuide,
    *args,
    num_chains: int,
    num_temperatures: int,
    num_leapfrog: int,
    start: str = "guide",
    theta: Theta = "mean",
    reverse: Mapping[str, Tensor] | None = None,
    max_memory: int = 2**30,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> Estimate:
    r"""The log evidence of every row by annealed importance sampling with Hamiltonian transitions.

    .. math:: \log p(x_n \mid \theta) \ge E \log \frac{1}{C} \sum_{c=1}^{C} w_{cn}, \qquad
              \log w_{cn} = \sum_{t=1}^{T} (\beta_t - \beta_{t-1}) \log \frac{p(x_n, z_{t-1} \mid \theta)}{q_0(z_{t-1})}

    Each of the ``C`` chains of a row goes through ``T`` temperatures from :math:`q_0`, the guide's factor or the prior, to the
    posterior, in unconstrained coordinates, along geometric averages of the two. A pilot run adapts the step sizes of the
    Hamiltonian transitions for each row and temperature. They are fixed before the chains start: with adaptation the result
    would be no bound. The cost is ``C (T - 1) (num_leapfrog + 1)`` gradients of every row's log joint.

    With exact draws from the posterior, ``reverse=``, the chains go backwards from them, and the result is an **upper** bound

    .. math:: \log p(x_n \mid \theta) \le - E \log \frac{1}{C} \sum_{c=1}^{C} \frac{1}{w_{cn}}.

    There are exact draws for data that the model itself has drawn: the latents that it was drawn with.

    Args:
        model: any Pyro model whose local latents are continuous.
        guide: one of the three guides for it.
        *args, **kwargs: the arguments of both.
        num_chains: ``C``, chains of each row.
        num_temperatures: ``T``; with 1 it is importance sampling.
        num_leapfrog: leapfrog steps of each transition.
        start: ``"guide"`` or ``"prior"``.
        theta: the values of the global latents on which the evidence is conditioned: ``"mean"`` for the mean of the guide's
            factor in unconstrained coordinates, ``"draw"`` for a draw from it, or values by site. To average over draws, call
            it several times with different ``seed=``.
        reverse: exact latents by site, in the site's shape or with ``C`` draws leftmost. Chains that start from one draw are
            not independent: the bound holds in expectation, but ``rows_se`` and ``se`` do not include the variance over
            that draw.
        max_memory: the memory in bytes of the chains that run at a time; at least one runs.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        The bounds on the rows' log evidences, their sum (rows of a minibatch stand for ``N / B`` each), standard errors
        over chains, and the bias estimated as in :func:`~pyro_avi.iwelbo`.

    Raises:
        ValueError: if a number is not positive, a latent is discrete or masked, or the rows have no evidence of their own.
        TypeError: if the guide is none of the three.

    References:
        Neal, "Annealed importance sampling", 2001, https://arxiv.org/abs/physics/9803008. Wu, Burda, Salakhutdinov and
        Grosse, "On the quantitative analysis of decoder-based generative models", 2017,
        https://arxiv.org/abs/1611.04273.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> bound = avi.ais(model, guide, x, num_chains=8, num_temperatures=5, num_leapfrog=2)
        >>> bound.rows.shape
        torch.Size([20])
    """
    seed = as_seed(seed)
    held, guide = hold_globals(model, guide, theta, args, kwargs, seed=seed)
    with isolated_sampling(seed):
        weights = annealed_weights(
            LocalJoint(held, args, kwargs, plate=guide.row_plate()),
            guide.fixed_posterior(*args, **kwargs),
            num_chains=num_chains,
            num_temperatures=num_temperatures,
            num_leapfrog=num_leapfrog,
            start=start,
            reverse=reverse,
            max_memory=max_memory,
            progress=progress,
        )
    if reverse is None:
        return iwelbo(weights)
    inverse = iwelbo(replace(weights, local=-weights.local))
    bias = None if inverse.rows_bias is None else -inverse.rows_bias
    return replace(inverse, value=-inverse.value, rows=-inverse.rows, bias=-inverse.bias, rows_bias=bias)


def annealed_weights(
    joint: LocalJoint,
    posterior,
    *,
    num_chains: int,
    num_temperatures: int,
    num_leapfrog: int,
    start: str = "guide",
    reverse: Mapping[str, Tensor] | None = None,
    max_memory: int = 2**30,
    progress: bool = False,
) -> LogWeights:
    """The log weights of the chains of every row, ``local [C, B]``; to be called inside :func:`isolated_sampling`.

    Args:
        joint: of the model.
        posterior: the guide's factor, batch shape ``[B]``, event shape ``[K]``.
        num_chains, num_temperatures, num_leapfrog, start, reverse, max_memory, progress: as in :func:`ais`.
    """
    numbers = {"num_chains": num_chains, "num_temperatures": num_temperatures, "num_leapfrog": num_leapfrog}
    for name, number in numbers.items():
        check_count(name, number)
    if start not in ("guide", "prior"):
        raise ValueError(f'Expected start= to be "guide" or "prior", got {start!r}.')
    if start == "guide" and (posterior.batch_shape, posterior.event_shape) != ((joint.num_rows,), (joint.num_latents,)):
        raise ValueError(
            f"Expected a guide's factor of {joint.num_rows} rows with {joint.num_latents} latents, got "
            f"{tuple(posterior.batch_shape)} and {tuple(posterior.event_shape)}.\n"
            'Pass the rows of a minibatch with their positions, or start="prior".'
        )

    def path(u: Tensor) -> tuple[Tensor, Tensor]:
        prior, likelihood = joint(u)
        return posterior.log_prob(u).double() if start == "guide" else prior, prior + likelihood

    @torch.no_grad()
    def draws(count: int) -> Tensor:
        return posterior.rsample((count,)) if start == "guide" else joint.prior_draws(count)

    beta = temperatures(num_temperatures)
    sizes = joint.chunks(num_chains, max_memory)
    with progress_bar((1 + len(sizes)) * (num_temperatures - 1), unit="transition", progress=progress) as bar:
        first = draws(min(_PILOT_CHAINS, max(4, sizes[0])))
        step_sizes = pilot(path, first, beta=beta, num_leapfrog=num_leapfrog, tick=bar.update)
        exact = None if reverse is None else joint.coordinates(reverse, num_chains).split(sizes)
        local = [
            anneal(
                path,
                draws(count) if exact is None else exact[i],
                beta=beta,
                step_sizes=step_sizes,
                num_leapfrog=num_leapfrog,
                reverse=exact is not None,
                tick=bar.update,
            )
            for i, count in enumerate(sizes)
        ]
    return joint.weigh(torch.cat(local))


@contextmanager
def isolated_sampling(seed: int):
    """A context for many runs of models apart from the program: under a seed, with a param store of their own, outside of the
    program's handlers, without validation, and with modules in evaluation mode.
    """
    with isolated_param_store(), seeded(seed), poutine.block(), evaluation_mode(), pyro.validation_enabled(False):
        yield
