"""Posterior draws and their log likelihoods for ArviZ."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.densities.log_weights import Weigher
from pyro_avi.diagnostics.posterior_predictive import Predictor
from pyro_avi.display.arviz_import import import_arviz
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import is_observation
from pyro_avi.lock import in_turn
from pyro_avi.seeds import Stream, as_seed

__all__ = ["to_arviz"]


@in_turn
def to_arviz(
    model: Callable,
    guide: Callable,
    *args,
    num_samples: int,
    plate: str | Sequence[str] | None = None,
    posterior_predictive: bool = True,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
):
    r"""Draws from a guide as ArviZ takes them, one chain of them.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both.
        num_samples: ``S``, the number of draws.
        plate: as for :func:`~pyro_avi.log_weights`.
        posterior_predictive: whether to draw the observations anew, ``S`` times the size of the data.
        seed: the seed of the draws; ``None`` for one drawn from the random state of the program.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1.x) with the groups ``posterior`` (latents
        by site, those of rows along a dimension of the plate's name), ``log_likelihood`` (of every observation, unscaled),
        ``posterior_predictive`` (of every observation a draw given the latents of the same draw, see
        :func:`~pyro_avi.posterior_predictive`), ``observed_data`` and ``sample_stats``: ``log_weight``, the log weight of the
        draw, and ``local_log_weight``, those of its rows (of its blocks of rows, where something ties rows), from which
        :func:`~pyro_avi.khat` and ArviZ's smoothing correct the guide. Enumerated latents of the model are drawn from their
        posterior given the guide's draw.

    Raises:
        ValueError: if the guide lacks a latent of the model, there are no draws, an observation cannot be drawn, or the model
            draws other rows every time.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> data = avi.to_arviz(model, guide, x, num_samples=10)
        >>> dict(data["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 10, 'data': 20, 'z_dim_0': 2}
    """
    arviz, seed = import_arviz(), as_seed(seed)
    groups: dict[str, dict[str, list[Tensor]]] = {"posterior": {}, "log_likelihood": {}, "sample_stats": {}}
    observed, dims = {}, {}
    coords: dict[str, list[int]] = {}
    # Apart, so that the latents are those of the seed with and without.
    predictor, stream = None, Stream(seed)
    with isolated_run(seed), progress_bar(num_samples, unit="draw", progress=progress) as bar:
        weigher = Weigher(model, guide, args, kwargs, plate=plate)
        if posterior_predictive:
            predictor = Predictor(model, guide, args, kwargs)
            groups |= {"posterior_predictive": {}} if predictor.sites else {}
        for model_trace, guide_trace in weigher.draws(num_samples):
            local, rest = weigher.weigh(model_trace, guide_trace)
            trace = weigher.completed(guide_trace) if weigher.enumerates else model_trace
            rows = _rows(trace)
            if coords and rows != coords:
                raise ValueError("Expected the same rows in every draw, got a model that draws its rows: pass them.")
            coords = rows
            _add(groups["sample_stats"], "log_weight", rest + weigher.attribution.scale * local.sum())
            _add(groups["sample_stats"], "local_log_weight", local)
            for name, site in _sites(trace):
                if site["is_observed"]:
                    _add(groups["log_likelihood"], name, site["fn"].log_prob(site["value"]))
                    observed[name] = site["value"].cpu().numpy()
                else:
                    _add(groups["posterior"], name, site["value"])
                dims[name] = _dims(name, site)
            if predictor is not None:
                with stream:
                    drawn = predictor.at(trace)
                for name, value in drawn.items():
                    _add(groups["posterior_predictive"], name, value)
            bar.update()
    dims["local_log_weight"] = [*weigher.plates] if weigher.attribution.by_row and weigher.plates else ["block"]
    arrays = {
        group: {name: torch.stack(values).unsqueeze(0).cpu().numpy() for name, values in sites.items()}
        for group, sites in groups.items()
    }
    arrays["observed_data"] = observed
    if int(arviz.__version__.partition(".")[0]) >= 1:
        return arviz.from_dict(arrays, coords=coords, dims=dims)
    return arviz.from_dict(**arrays, coords=coords, dims=dims)


def _add(group: dict[str, list[Tensor]], name: str, value: Tensor) -> None:
    group.setdefault(name, []).append(value.detach())


def _sites(trace: Trace) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The latents and observations of a trace, by name."""
    for name, site in trace.nodes.items():
        plain = site["type"] == "sample" and not site_is_subsample(site)
        if plain and (not site["is_observed"] or is_observation(site)):
            yield name, site


def _rows(trace: Trace) -> dict[str, list[int]]:
    """The positions of the rows of every plate, by its name."""
    sizes = {frame.name: frame.size for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())}
    rows = {name: list(range(size)) for name, size in sizes.items()}
    drawn = {name: site["value"].tolist() for name, site in trace.nodes.items() if site_is_subsample(site)}
    return {**rows, **{name: index for name, index in drawn.items() if name in rows}}


def _dims(name: str, site) -> list[str]:
    """The names of a value's dimensions: those of plates by their plate, others by the site."""
    fn, plates = site["fn"], {frame.dim: frame.name for frame in site["cond_indep_stack"]}
    batch = [plates.get(dim, f"{name}_batch_{-dim}") for dim in range(-len(fn.batch_shape), 0)]
    return batch + [f"{name}_dim_{i}" for i in range(fn.event_dim)]
