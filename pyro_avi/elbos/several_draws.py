"""What the ELBOs of several draws share: the log weights of every row and draw."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.elbos.sites import WithoutPath, is_latent
from pyro_avi.errors import check_count
from pyro_avi.rows.uniform_subsample import UniformSubsample

__all__ = ["PARTICLES", "Draws", "RowSums", "SeveralDrawsELBO", "Traces", "sites_of"]

#: The name of the plate of draws that are taken at once, as Pyro has it.
PARTICLES = "num_particles_vectorized"

Traces = tuple[Any, Any]


def sites_of(*traces: Any) -> list[Any]:
    """The sites of traces that have a density: latents and observations."""
    return [
        site
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample" and not site_is_subsample(site) and not isinstance(site["fn"], UniformSubsample)
    ]


class Draws(NamedTuple):
    r"""K draws of the latents of a call, by row.

    Attributes:
        log_weights: ``[K, *B]`` of :math:`\log p(x_n, z_{nk}) - \log q(z_{nk})`, unscaled.
        log_q: ``[K, *B]`` of the log density of those latents that have no path; zero where there are none.
        has_scores: whether there are latents without a path.
    """

    log_weights: Tensor
    log_q: Tensor
    has_scores: bool


class RowSums:
    """Sums the values of sites to the rows of a call.

    Rows are those of the plates that every site of model and guide is in. Without one the call is a row of its own.

    Args:
        traces: of model and guide, without the sites of subsamples.

    Attributes:
        dims: the dimensions of the rows in a site's batch, outermost first.
        particles: the dimension of draws that are taken at once, ``None`` where there are none.
        scale: ``N / B``, what a row stands for in a sum over the data.
    """

    def __init__(self, traces: Traces):
        found: dict[str, Any] = {}
        common: set[str] | None = None
        for site in sites_of(*traces):
            frames = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
            found |= frames
            common = set(frames) if common is None else common & set(frames)
        particles = found.pop(PARTICLES, None)
        self.particles = None if particles is None else particles.dim
        rows = sorted((found[name] for name in (common or set()) - {PARTICLES}), key=lambda frame: frame.dim)
        self.dims = [frame.dim for frame in rows]
        self.scale = prod((frame.full_size or frame.size) / frame.size for frame in rows)

    def __call__(self, values: Tensor) -> Tensor:
        """Sums ``[*B]``, of draws that are taken at once ``[K, *B]``.

        Args:
            values: in the shape of a site's batch.
        """
        kept = [*([] if self.particles is None else [self.particles]), *self.dims]
        others = [dim for dim in range(-values.dim(), 0) if dim not in kept]
        if others:
            values = values.sum(others, keepdim=True)
        return values.reshape([values.shape[dim] if -dim <= values.dim() else 1 for dim in kept])

    def join(self, draws: Sequence[Tensor]) -> Tensor:
        """``[K, *B]`` of the sums of each run of the guide."""
        return torch.stack(list(draws)) if self.particles is None else draws[0]


class SeveralDrawsELBO(ELBO):
    """An ELBO whose loss is a function of the log weights of several draws of every row.

    Rows are those of the plates that hold every site of model and guide, and weighted each by itself. With latents or
    observations outside of a plate, the draws of the whole call are weighted together.

    Args:
        num_particles: ``K``, the draws.
        continuous: whether latents with a path are given the score function as well.
        vectorize_particles, max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if there are fewer draws than the estimator needs.
    """

    #: The fewest draws it is defined for.
    least_particles = 1

    def __init__(self, num_particles: int = 2, *, continuous: bool = False, **kwargs):
        check_count("num_particles", num_particles, self.least_particles)
        super().__init__(num_particles=num_particles, **kwargs)
        self._continuous = continuous

    @abstractmethod
    def bound(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The bound of every row ``[*B]``, and what is differentiated in its place."""

    def _get_trace(self, model, guide, args, kwargs):
        guide = WithoutPath()(guide) if self._continuous else guide
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    def _read(self, pairs: Sequence[Traces], rows: RowSums) -> Draws:
        """The draws of these traces of model and guide."""
        weights, scores = [], []
        for model_trace, guide_trace in pairs:
            log_p = sum(rows(site["log_prob"]) for site in sites_of(model_trace))
            log_q = sum(rows(site["log_prob"]) for site in sites_of(guide_trace))
            weights.append((log_p - log_q) / rows.scale)
            parts = [site["score_parts"].score_function for site in sites_of(guide_trace) if is_latent(site)]
            scores.append([rows(part) for part in parts if isinstance(part, Tensor)])
        of_scores = [sum(parts) + torch.zeros_like(weight) for parts, weight in zip(scores, weights, strict=True)]
        return Draws(rows.join(weights), rows.join(of_scores), any(scores))

    def value_and_surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The loss of the call, without a gradient, and what is differentiated in its place.

        Args:
            model, guide, args, kwargs: the pair, and a call of both.
        """
        pairs = list(self._get_traces(model, guide, args, kwargs))
        rows = RowSums(pairs[0])
        value, surrogate = self.bound(self._read(pairs, rows))
        return -rows.scale * value.detach().sum(), -rows.scale * surrogate.sum()

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The negative bound, with the gradient of the estimator.

        Args:
            model, guide: the pair.
            *args, **kwargs: the arguments of both.
        """
        value, surrogate = self.value_and_surrogate(model, guide, args, kwargs)
        return value + (surrogate - surrogate.detach())

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The negative bound.

        Args:
            model, guide: the pair.
            *args, **kwargs: the arguments of both.
        """
        return self.value_and_surrogate(model, guide, args, kwargs)[0].item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The negative bound, whose gradient is added to that of the parameters.

        Args:
            model, guide: the pair.
            *args, **kwargs: the arguments of both.
        """
        value, surrogate = self.value_and_surrogate(model, guide, args, kwargs)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        return value.item()
