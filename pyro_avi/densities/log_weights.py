"""Log weights of draws from a guide: the only place where traces are evaluated."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.densities.attribution import Attribution, attribute
from pyro_avi.densities.log_factors import drawn_traces, enumeration_depth, log_factors, sample_enumerated, trace_at
from pyro_avi.densities.perturbation import HasRowPlates
from pyro_avi.display.formatting import counted, with_error
from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.evaluation_mode import evaluation_mode
from pyro_avi.inspection.data_errors import explain_data_errors
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import check_data, is_latent, row_plate
from pyro_avi.param_store import isolated_param_store
from pyro_avi.seeds import draws_from

__all__ = ["LogWeights", "Weigher", "log_weights"]


@dataclass(frozen=True)
class LogWeights:
    r"""Log weights of ``S`` draws, split into independent blocks of rows and the rest, in nats and double precision.

    A block has every factor of the joint that depends on its latents, in whatever plate. Usually each row is a block; rows
    that share a factor (a series, a pairwise observation, crossed plates) are one block together.

    Attributes:
        local: ``[S, M]``, :math:`\log p(x_m, z_m \mid \theta) - \log q(z_m)`, unscaled.
        global_: ``[S]``, :math:`\log p(\theta) - \log q(\theta)`, and all factors that depend on no latent of a row.
        scale: ``N / B``, the number of blocks of the data that one block of the call stands for.
        has_globals: whether blocks share latents, so that they are independent only given a draw of these.
        blocks: by the plates of a set of rows the block ``[N]`` of each of them; ``None`` where block ``n`` is row ``n``.
        is_estimate: whether a block's density is itself an estimate, because another plate subsamples its rows.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> avi.LogWeights(local=torch.tensor([[1.0, 2.0], [3.0, 2.0]]), global_=torch.zeros(2), scale=1.0)
        LogWeights(2 draws of 2 rows, ELBO 4.0 ± 1.0 nats)
    """

    local: Tensor
    global_: Tensor
    scale: float
    has_globals: bool = True
    blocks: Mapping[tuple[str, ...], Tensor] | None = None
    is_estimate: bool = False

    def __repr__(self) -> str:
        total = self.total
        error = total.std() / len(total) ** 0.5 if len(total) > 1 else torch.nan
        parts = counted(self.local.shape[-1], "row" if self.blocks is None else "block")
        size = f"{counted(len(total), 'draw')} of {parts}"
        return f"LogWeights({size}, ELBO {with_error(float(total.mean()), float(error))} nats)"

    @property
    def total(self) -> Tensor:
        """``[S]`` the log weights of the whole data set, ``global_ + scale * sum_m local``."""
        return self.global_ + self.scale * self.local.sum(-1)


@torch.no_grad()
def log_weights(
    model: Callable,
    guide: Callable,
    *args,
    num_samples: int,
    plate: str | Sequence[str] | None = None,
    seed: int | None = 0,
    progress: bool = True,
    **kwargs,
) -> LogWeights:
    r"""Draw from the guide and weigh the draws by the model.

    .. math:: \log w = \log p(x, z, \theta) - \log q(z, \theta)

    Its mean is the ELBO. Observed values are those that the model conditions on in a call with these arguments. Latents of
    the model that are marked to be enumerated, and that the guide does not sample, are summed out. Modules are called in
    evaluation mode.

    The factors of a row are found by changing its latents: those that then change are the row's, in whatever plate they are.
    Before the draws are made, the parts are checked to add up to the log joint.

    Args:
        model: any Pyro callable.
        guide: any Pyro guide.
        *args, **kwargs: the arguments of both.
        num_samples: ``S``, the number of draws.
        plate: the name of the plate of the rows, or several; by default those of the guide, if it is one of the three, or
            the one that holds both a latent and an observation. Where no latent lies in a plate the call is one row.
        seed: the seed of the draws, with which the program's random state is left as it was; ``None`` to draw from that
            state.
        progress: whether to show a progress bar, which appears after the first second.

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
    local, global_ = [], []
    with draws_from(seed), isolated_param_store(), evaluation_mode():
        weigher = Weigher(model, guide, args, kwargs, plate=plate)
        with progress_bar(num_samples, unit="draw", progress=progress) as bar:
            for traces in weigher.draws(num_samples):
                weights = weigher.weigh(*traces)
                local.append(weights[0])
                global_.append(weights[1])
                bar.update()
    return weigher.collect(torch.stack(local), torch.stack(global_))


class Weigher:
    """Draws from a guide and weighs them by the model, for one call of both.

    Args:
        model, guide, args, kwargs, plate: as in :func:`log_weights`.

    Attributes:
        plates: the names of the plates of the rows.
        attribution: how the log joint splits.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        plate: str | Sequence[str] | None = None,
    ):
        self._model, self._guide, self._args, self._kwargs = model, guide, args, kwargs
        with isolated_run(0), explain_data_errors(args, kwargs):
            guide_trace, trace = drawn_traces(model, guide, args, kwargs)
            check_data(trace)
        self.plates = _plates(plate, guide, trace)
        _check_sites(trace, guide_trace)
        self._depth = enumeration_depth(trace, guide_trace.nodes)
        self.attribution: Attribution = attribute(model, guide, args, kwargs, self.plates, traces=(guide_trace, trace))
        # Where the elements of a factor are not in the order of the rows, every draw must be about the same rows.
        self._rows = None if self.attribution.in_order else _rows(trace)

    def draws(self, num_samples: int) -> Iterator[tuple[Trace, Trace]]:
        """Traces of model and guide with the same latents, drawn from the guide.

        Args:
            num_samples: the number of draws.

        Raises:
            ValueError: if it is not positive.
        """
        check_count("num_samples", num_samples)
        for _ in range(num_samples):
            guide_trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
            yield trace_at(self._model, self._args, self._kwargs, guide_trace, depth=self._depth), guide_trace

    @property
    def enumerates(self) -> bool:
        """Whether latents of the model are summed out."""
        return self._depth is not None

    def completed(self, guide_trace: Trace) -> Trace:
        """A trace of the model with the latents of a draw, and draws from the posterior of those that are summed out."""
        depth = cast(int, self._depth)
        return sample_enumerated(self._model, self._args, self._kwargs, guide_trace, depth=depth)

    def weigh(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor]:
        """The log weight of one draw: the part of each block ``[M]``, and the rest ``[]``."""
        if self._rows is not None and not _same_rows(self._rows, model_trace):
            raise ValueError(
                f"Expected the same rows of plates {self.plates} in every draw, got a model that draws them and observes "
                "rows in other plates.\nPass the rows of the call as arguments: pyro.plate(name, size, subsample=index)."
            )
        model_blocks, model_rest = self.attribution.split(log_factors(model_trace))
        guide_blocks, guide_rest = self.attribution.split(log_factors(guide_trace), is_guide=True)
        return model_blocks - guide_blocks, model_rest - guide_rest

    def collect(self, local: Tensor, global_: Tensor) -> LogWeights:
        """The log weights of several draws together."""
        split = self.attribution
        return LogWeights(
            local,
            global_,
            split.scale,
            split.has_globals,
            None if split.by_row else split.blocks,
            split.is_estimate,
        )


def _rows(trace: Trace) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in trace.nodes.items() if site_is_subsample(site)}


def _same_rows(rows: Mapping[str, Tensor], trace: Trace) -> bool:
    return all(torch.equal(index, rows[name]) for name, index in _rows(trace).items())


def _plates(given: str | Sequence[str] | None, guide: Callable, trace: Trace) -> tuple[str, ...]:
    """The plates of the rows: as given, as the guide has them, or as the model suggests."""
    if given is not None:
        return (given,) if isinstance(given, str) else tuple(given)
    if isinstance(guide, HasRowPlates):
        return guide.row_plates
    found = row_plate(trace)
    inside = [name for name, site in trace.nodes.items() if is_latent(site) and site["cond_indep_stack"]]
    if found is None and inside:
        raise ValueError(
            "Expected a model with a plate that holds both a latent and an observation, found none.\n"
            f"Pass the observations to this call, or name the plate of the rows, which hold {inside}: plate=..."
        )
    return () if found is None else (found,)


def _check_sites(model_trace: Trace, guide_trace: Trace) -> None:
    def latents(trace):
        return {name for name, site in trace.nodes.items() if is_latent(site) and not site["infer"].get("is_auxiliary")}

    enumerated = {
        name for name, site in model_trace.nodes.items() if site["type"] == "sample" and site["infer"].get("enumerate")
    }
    missing = latents(model_trace) - latents(guide_trace) - enumerated
    unknown = latents(guide_trace) - latents(model_trace) - enumerated
    if missing or unknown:
        raise ValueError(
            f"Expected the guide to sample the latents of the model, got none for {sorted(missing)} and others "
            f"{sorted(unknown)}."
        )
