"""How noisy estimators of a gradient are, on any model and guide."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.elbos.rao_blackwellized import RaoBlackwellizedELBO
from pyro_avi.errors import check_count
from pyro_avi.gradients.draws import GradientDraws
from pyro_avi.gradients.estimator import GradientEstimator, Pair, estimator_names, find_estimator
from pyro_avi.gradients.results import EstimatorNoise, GradientVariance, GroupNoise
from pyro_avi.lock import in_turn
from pyro_avi.optimization.losses import averages_restored, find_parameters
from pyro_avi.optimization.step import HasLocalParameters
from pyro_avi.param_store import buffers_restored, isolated_param_store
from pyro_avi.seeds import as_seed, seeded

__all__ = ["gradient_variance"]


@in_turn
def gradient_variance(
    model: Callable,
    guide: Callable,
    *args,
    num_samples: int,
    estimators: Sequence[str] | None = None,
    num_particles: int = 8,
    temperature: float = 0.5,
    max_memory: int = 2**30,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> GradientVariance:
    r"""Measure mean and variance of gradient estimators, at the present parameters of a model and a guide.

    .. math:: \hat V = \frac{1}{S - 1} \sum_s \lVert g_s - \bar g \rVert^2, \qquad
              \mathrm{SNR} = \lVert E g \rVert / \sqrt{V}, \qquad
              \mathrm{se}(\hat V)^2 = \frac 1S \mathrm{Var}_s \lVert g_s - \bar g \rVert^2

    of the gradients :math:`g_s` of the bound, for the whole data set. Every estimator is evaluated under the same seeds, so
    that those that draw alike have the same draws. Nothing is trained.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both.
        num_samples: ``S``, the evaluations of each estimator.
        estimators: their names, by default all that can be used on the pair: ``pathwise``, ``sticking_the_landing``,
            ``closed_form_kl``; ``score_function``, ``decaying_baseline``, ``learned_baseline``, ``rao_blackwellized``,
            ``leave_one_out``; ``enumeration``; ``gumbel_softmax``, ``straight_through``, which are biased; and of the
            importance-weighted bound ``importance_weighted``, ``doubly_reparameterized``, ``vimco``.
        num_particles: the draws of ``leave_one_out`` and of the importance-weighted bound in one evaluation, at least 2.
        temperature: of relaxed latents.
        max_memory: the most bytes for the gradients of one estimator, of which two are held at a time.
        seed: the seed of the draws, with which the program's random state is left as it was; ``None`` to draw from that
            state.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        The noise by estimator. Groups of parameters are ``local`` (the inference function), ``global`` and ``model``; of guides
        that do not tell the first two apart ``guide`` and ``model``.

    Raises:
        ValueError: if an estimator is asked for that cannot be used on the pair: a path of discrete latents, enumeration of an
            infinite support, one draw to leave out; or the gradients do not fit into ``max_memory``.

    References:
        Mohamed, Rosca, Figurnov and Mnih, "Monte Carlo Gradient Estimation in Machine Learning", 2020,
        https://arxiv.org/abs/1906.10652.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model)
        >>> names = ["pathwise", "score_function"]
        >>> noise = avi.gradient_variance(model, guide, x, estimators=names, num_samples=50, progress=False)
        >>> noise
        GradientVariance(2 estimators, 50 draws each)
        >>> noise["pathwise"].groups["local"].variance < noise["score_function"].groups["local"].variance
        True
        >>> noise["pathwise"].rows["z"].shape
        torch.Size([20])
    """
    check_count("num_samples", num_samples, 2)
    check_count("num_particles", num_particles, 2)
    with isolated_param_store(), seeded(as_seed(seed)), buffers_restored(model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered NaN")
        pair = Pair.of(model, guide, args, kwargs, num_particles, temperature)
        chosen, left_out = _choose(estimators, pair)
        seeds = torch.randint(2**31, (num_samples,)).tolist()
        found: dict[str, EstimatorNoise] = {}
        references: dict[str, tuple[str, Tensor]] = {}
        with progress_bar(num_samples * len(chosen), unit="draw", progress=progress) as bar:
            # Unbiased ones first, which biased ones are compared with.
            for name, estimator in sorted(chosen.items(), key=lambda item: item[1].is_biased):
                # Averages of one estimator are none of another's.
                with averages_restored():
                    source, names = _source(name, estimator, pair, model, guide, args, kwargs)
                    _check_memory(names, num_samples, max_memory)
                    source.warm_up(estimator.warm_up)
                    gradients = torch.stack([_counted(source.draw(one), bar) for one in seeds])
                found[name] = _noise(name, estimator, source, names, gradients, references)
        return GradientVariance({name: found[name] for name in chosen}, num_samples, left_out)


def _counted(gradient: Tensor, bar: Any) -> Tensor:
    bar.update()
    return gradient


def _choose(names: Sequence[str] | None, pair: Pair) -> tuple[dict[str, GradientEstimator], dict[str, str]]:
    """The estimators asked for, or all that can be used, and why the others cannot."""
    if isinstance(names, str):
        raise TypeError(f"Expected a list of estimators, got {names!r}.\nPass estimators=[{names!r}].")
    if names is not None:
        chosen = {name: find_estimator(name) for name in names}
        if not chosen:
            raise ValueError("Expected at least one estimator, got none.")
        for estimator in chosen.values():
            estimator.create(pair)
        return chosen, {}
    chosen, left_out = {}, {}
    for name in estimator_names():
        estimator = find_estimator(name)
        try:
            estimator.create(pair)
        except ValueError as error:
            left_out[name] = str(error)
        else:
            chosen[name] = estimator
    return chosen, left_out


def _source(
    name: str,
    estimator: GradientEstimator,
    pair: Pair,
    model: Callable,
    guide: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[GradientDraws, dict[str, tuple[str, Tensor]]]:
    """What evaluates an estimator, and by the name of each parameter its group and itself."""
    elbo = estimator.create(pair)
    parameters, _ = find_parameters(elbo, model, estimator.guide(guide), args, kwargs)
    networks = elbo.networks.values() if isinstance(elbo, RaoBlackwellizedELBO) else ()
    baselines = {id(p) for network in networks for p in network.parameters()}
    named = _names([p for p in parameters if id(p) not in baselines], pair, model, guide)
    tensors = [parameter for _, parameter in named.values()]
    return GradientDraws(elbo, model, guide, estimator.guide, args, kwargs, tensors), named


def _names(parameters: Sequence[Tensor], pair: Pair, model: Any, guide: Any) -> dict[str, tuple[str, Tensor]]:
    """By name the group of each parameter and itself; those of no module have a number for a name."""
    local = {id(p) for p in guide.local_parameters()} if isinstance(guide, HasLocalParameters) else set()
    found: dict[str, tuple[str, Tensor]] = {}
    for position, parameter in enumerate(parameters):
        part, group = (guide, "guide") if id(parameter) in pair.in_guide else (model, "model")
        module = getattr(part, "__self__", part)
        named = module.named_parameters() if isinstance(module, nn.Module) else ()
        name = next((name for name, own in named if own is parameter), str(position))
        if group == "guide" and local:
            group = "local" if id(parameter) in local else "global"
        found[f"{'model' if group == 'model' else 'guide'}.{name}"] = group, parameter
    return dict(sorted(found.items()))


def _check_memory(named: Mapping[str, tuple[str, Tensor]], num_samples: int, max_memory: int) -> None:
    needed = 8 * num_samples * sum(parameter.numel() for _, parameter in named.values())
    if needed > max_memory:
        raise ValueError(
            f"Expected the gradients of {num_samples} draws to fit into max_memory = {max_memory:,} bytes, got {needed:,}.\n"
            "Pass a smaller num_samples or a larger max_memory."
        )


def _noise(
    name: str,
    estimator: GradientEstimator,
    source: GradientDraws,
    named: Mapping[str, tuple[str, Tensor]],
    gradients: Tensor,
    references: dict[str, tuple[str, Tensor]],
) -> EstimatorNoise:
    """The noise of gradients ``[S, P]``; an unbiased estimator with less than the reference becomes the reference."""
    sizes = [parameter.numel() for _, parameter in named.values()]
    shapes = [parameter.shape for _, parameter in named.values()]
    mean, variance = gradients.mean(0), gradients.var(0)
    reference = references.get(estimator.bound)
    groups = {}
    for group in sorted({group for group, _ in named.values()}):
        inside = torch.cat(
            [torch.full((size,), own == group) for size, (own, _) in zip(sizes, named.values(), strict=True)]
        )
        other = None if reference is None else reference[1][:, inside]
        groups[group] = _of_group(gradients[:, inside], other)
    if not estimator.is_biased and (reference is None or gradients.var(0).sum() < reference[1].var(0).sum()):
        references[estimator.bound] = name, gradients
    return EstimatorNoise(
        name,
        estimator.bound,
        estimator.is_biased,
        {n: x.view(shape) for n, x, shape in zip(named, mean.split(sizes), shapes, strict=True)},
        {n: x.view(shape) for n, x, shape in zip(named, variance.split(sizes), shapes, strict=True)},
        groups,
        {site: moments.variance.sum(-1) for site, moments in source.rows.items()},
        median(source.seconds),
        source.evaluations,
    )


def _of_group(gradients: Tensor, reference: Tensor | None) -> GroupNoise:
    count = len(gradients)
    mean = gradients.mean(0)
    squares = (gradients - mean).square().sum(1) * count / (count - 1)
    variance = squares.mean().item()
    signal = max(mean.square().sum().item() - variance / count, 0.0) ** 0.5
    snr = signal / variance**0.5 if variance > 0 else math.inf if signal > 0 else math.nan
    bias = noise = math.nan
    if reference is not None:
        # Draw by draw: what both have in common is no noise of the difference.
        difference = gradients - reference
        bias = difference.mean(0).norm().item()
        noise = (difference.var(0).sum().item() / count) ** 0.5
    return GroupNoise(variance, squares.std().item() / count**0.5, snr, bias, noise)
