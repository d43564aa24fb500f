"""Log weights of draws from a guide: the only place where traces are evaluated."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_avi.parameters import own_parameters
from pyro_avi.structure import is_latent, row_plate

__all__ = ["LogWeights", "draw_traces", "log_weights", "row_log_probs", "weigh"]


@dataclass(frozen=True)
class LogWeights:
    r"""Log weights of ``S`` draws, split into rows and the rest, in nats and double precision.

    Attributes:
        local: ``[S, B]``, :math:`\log p(x_n, z_n \mid \theta) - \log q(z_n)`, unscaled.
        global_: ``[S]``, :math:`\log p(\theta) - \log q(\theta)`, with all else that stands outside the plate.
        scale: ``N / B``, what one row of the call stands for in a sum over the data.
        has_globals: whether the rows share latents, so that they are independent only given a draw of these.
    """

    local: Tensor
    global_: Tensor
    scale: float
    has_globals: bool = True

    @property
    def total(self) -> Tensor:
        """``[S]`` the log weights of the whole data set, ``global_ + scale * sum_n local``."""
        return self.global_ + self.scale * self.local.sum(-1)


@torch.no_grad()
def log_weights(
    model: Callable, guide: Callable, *args, num_samples: int, plate: str | None = None, **kwargs
) -> LogWeights:
    r"""Draw from the guide and weigh the draws by the model.

    .. math:: \log w = \log p(x, z, \theta) - \log q(z, \theta)

    Its mean is the ELBO. Observed values are those that the model conditions on in a call with these arguments.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both.
        num_samples: ``S``, the number of draws.
        plate: the name of the plate of the rows; by default the one that holds both a latent and an observation.

    Raises:
        ValueError: if there is no such plate, the guide lacks a latent of the model, or ``num_samples`` is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.FactorizedGuide(model)
        >>> weights = avi.log_weights(model, guide, x, num_samples=3)
        >>> weights.local.shape, weights.global_.shape
        (torch.Size([3, 20]), torch.Size([3]))
    """
    local, global_, scale, has_globals = [], [], 1.0, False
    with own_parameters():
        for model_trace, guide_trace in draw_traces(model, guide, args, kwargs, num_samples):
            of_rows, rest, scale, has_globals, plate = weigh(model_trace, guide_trace, plate)
            local.append(of_rows)
            global_.append(rest)
    return LogWeights(torch.stack(local), torch.stack(global_), scale, has_globals)


def draw_traces(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], num_samples: int
) -> Iterator[tuple[Trace, Trace]]:
    """Traces of model and guide with the same latents, drawn from the guide.

    Args:
        model, guide, args, kwargs, num_samples: as in :func:`log_weights`.

    Raises:
        ValueError: if ``num_samples`` is not positive.
    """
    if num_samples < 1:
        raise ValueError(f"Expected num_samples of at least 1, got {num_samples}.")
    for _ in range(num_samples):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        yield poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace


def _find_plate(model_trace: Trace) -> str:
    plate = row_plate(model_trace)
    if plate is None:
        raise ValueError(
            "Expected a model with a plate that holds both a latent and an observation, found none.\n"
            "Pass the observations to this call, or name the plate of the rows: plate=..."
        )
    return plate


def weigh(model_trace: Trace, guide_trace: Trace, plate: str | None) -> tuple[Tensor, Tensor, float, bool, str]:
    """The log weight of one draw: by row ``[B]``, the rest ``[]``, the plate's scale, whether there are globals; the plate.

    Args:
        model_trace, guide_trace: with the same latents.
        plate: the name of the plate of the rows; by default the one that holds both a latent and an observation.
    """
    plate = _find_plate(model_trace) if plate is None else plate
    traces = [prune_subsample_sites(trace) for trace in (model_trace, guide_trace)]
    _check_sites(*traces)
    by_row, rest, scale, has_globals = [], [], None, False
    for sign, trace in zip((1, -1), traces, strict=True):
        for site, value, of_plate in row_log_probs(trace, plate):
            if of_plate is None:
                rest.append(sign * value)
                has_globals |= is_latent(site)
            else:
                by_row.append(sign * value)
                scale = of_plate
    if scale is None:
        raise ValueError(f"Expected sites in plate {plate!r}, found none.")
    rest = sum(rest, torch.zeros((), dtype=torch.double, device=by_row[0].device))
    return sum(by_row), rest, scale, has_globals, plate


def row_log_probs(
    trace: Trace, plate: str, *, outer: pyro.plate | None = None
) -> Iterator[tuple[dict, Tensor, float | None]]:
    """The log density of every sample site of a trace by the rows of a plate, in double precision.

    Args:
        trace: of a model or guide, without subsample sites.
        plate: the name of the plate of the rows.
        outer: a plate around the whole run, whose dimension is kept beside that of the rows.

    Yields:
        A site, its log density ``[B]`` (``[C, B]`` with ``C`` runs in the outer plate) and the plate's ``N / B``; of a site
        outside the plate the sum ``[]`` and ``None``.
    """
    trace.compute_log_prob()
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        value = torch.as_tensor(site["log_prob"]).double()
        frame = next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)
        if frame is None:
            yield site, value.sum(), None
            continue
        if not frame.vectorized:
            raise ValueError(
                f"Expected a vectorized plate, got the sequential plate {plate!r}.\n"
                f"Write `with pyro.plate({plate!r}, size):` instead of `for i in pyro.plate(...)`."
            )
        kept = [frame] if outer is None else [outer, frame]
        sizes = [of.size for of in kept]
        value = value.reshape((1,) * (max(-of.dim for of in kept) - value.dim()) + tuple(value.shape))
        value = value.movedim([of.dim for of in kept], list(range(len(kept))))
        # Unscaled: the plate's N / B belongs to a sum over the data, not to a row.
        scale = (frame.full_size or frame.size) / frame.size
        yield site, value.expand(*sizes, *value.shape[len(kept) :]).reshape(*sizes, -1).sum(-1) / scale, scale


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    def latents(trace):
        return {
            name
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site["infer"].get("is_auxiliary")
        }

    missing, unknown = latents(model_trace) - latents(guide_trace), latents(guide_trace) - latents(model_trace)
    if missing or unknown:
        raise ValueError(
            f"Expected the guide to sample the latents of the model, got none for {sorted(missing)} and others "
            f"{sorted(unknown)}."
        )
