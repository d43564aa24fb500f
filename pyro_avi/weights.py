"""Log weights of draws from a guide: the only place where traces are evaluated."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_avi.parameters import own_parameters
from pyro_avi.structure import row_plate

__all__ = ["LogWeights", "log_weights"]


@dataclass(frozen=True)
class LogWeights:
    r"""Log weights of ``S`` draws, split into rows and the rest, in nats and double precision.

    Attributes:
        local: ``[S, B]``, :math:`\log p(x_n, z_n \mid \theta) - \log q(z_n)`, unscaled.
        global_: ``[S]``, :math:`\log p(\theta) - \log q(\theta)`, with all else that stands outside the plate.
        scale: ``N / B``, what one row of the call stands for in a sum over the data.
    """

    local: Tensor
    global_: Tensor
    scale: float

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
    if num_samples < 1:
        raise ValueError(f"Expected num_samples of at least 1, got {num_samples}.")
    local, global_, scale = [], [], 1.0
    with own_parameters():
        for _ in range(num_samples):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
            if plate is None:
                plate = _find_plate(model_trace)
            of_rows, rest, scale = _split(model_trace, guide_trace, plate)
            local.append(of_rows)
            global_.append(rest)
    return LogWeights(torch.stack(local), torch.stack(global_), scale)


def _find_plate(model_trace: Trace) -> str:
    plate = row_plate(model_trace)
    if plate is None:
        raise ValueError(
            "Expected a model with a plate that holds both a latent and an observation, found none.\n"
            "Pass the observations to this call, or name the plate of the rows: plate=..."
        )
    return plate


def _split(model_trace: Trace, guide_trace: Trace, plate: str) -> tuple[Tensor, Tensor, float]:
    """The log weight of one draw: by row ``[B]``, the rest ``[]``, and the plate's scale."""
    traces = [prune_subsample_sites(trace) for trace in (model_trace, guide_trace)]
    _check_sites(*traces)
    by_row, rest, scale = [], [], None
    for sign, trace in zip((1, -1), traces, strict=True):
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] != "sample":
                continue
            value = sign * torch.as_tensor(site["log_prob"]).double()
            frame = next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)
            if frame is None:
                rest.append(value.sum())
                continue
            if not frame.vectorized:
                raise ValueError(
                    f"Expected a vectorized plate, got the sequential plate {plate!r}.\n"
                    f"Write `with pyro.plate({plate!r}, size):` instead of `for i in pyro.plate(...)`."
                )
            # Unscaled: the plate's N / B belongs to a sum over the data, not to a row.
            scale = (frame.full_size or frame.size) / frame.size
            value = value.expand((frame.size,) + (1,) * (-frame.dim - 1)) if value.dim() < -frame.dim else value
            by_row.append(value.movedim(frame.dim, 0).flatten(1).sum(1) / scale if value.dim() > 1 else value / scale)
    if scale is None:
        raise ValueError(f"Expected sites in plate {plate!r}, found none.")
    return sum(by_row), sum(rest, torch.zeros((), dtype=torch.double, device=by_row[0].device)), scale


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
