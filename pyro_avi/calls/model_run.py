"""One isolated run of a model: its rows, observed values, masks and scales."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.calls.replay import Recorder
from pyro_avi.inspection.data_errors import explain_data_errors
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.masks import Mask, site_mask
from pyro_avi.inspection.sites import check_data, is_observation, is_scaled, plate_scale, sizes_by_shape
from pyro_avi.rows.subsample import Subsample, check_positions

__all__ = ["CallData", "Run", "DataQuery", "run_once"]


@dataclass(frozen=True)
class CallData:
    """The data of one call of the model.

    Attributes:
        rows: the rows of the call, by plate.
        values: the observed values, by site.
        masks: the masks, by site; only sites that are masked.
        scales: the factor by which a site's log density counts beyond its plates' ``N / B``, by site; only those scaled.
        given: the values of latents that this call observes, by site.
        draws: the values of global latents that the guide has drawn in this call, by site, for encoders that read them.
    """

    rows: dict[str, Subsample]
    values: dict[str, Tensor]
    masks: dict[str, Mask]
    scales: dict[str, Tensor | float]
    given: dict[str, Tensor] = field(default_factory=dict)
    draws: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DataQuery:
    """What is to be read from each call of a model.

    Attributes:
        plates: the names of the plates whose rows are to be known.
        sites: the observed sites to read.
        latents: the latent sites whose masks and scales are to be known, and whether the call observes them.
        optional: whether the observed sites are only to recognize a call by.
        unobserved: whether the model is to observe nothing in the plates of its latents.
        inputs: whether the caller can be told what to read.
    """

    plates: tuple[str, ...]
    sites: tuple[str, ...] = ()
    latents: tuple[str, ...] = ()
    optional: bool = False
    unobserved: bool = False
    inputs: bool = False

    def __str__(self) -> str:
        if not self.plates:
            return f"latents {list(self.latents)}"
        return f"plate{'s' if len(self.plates) > 1 else ''} {', '.join(map(repr, self.plates))}"


@dataclass(frozen=True)
class Run:
    """A run of the model.

    Attributes:
        data: of the call; its scales include those of the plates.
        drawn: ``(N, B)`` of each plate whose ``B`` of ``N`` rows are not decided by the model's arguments.
        rows: the rows that were drawn there.
        trace: of the model.
    """

    data: CallData
    drawn: dict[str, tuple[int, int]]
    rows: dict[str, Tensor]
    trace: Trace

    @property
    def plain_scales(self) -> dict[str, float]:
        """By scaled site the part of its scale that is due to its plates."""
        return {name: plate_scale(self.trace.nodes[name]["cond_indep_stack"]) for name in self.data.scales}

    @property
    def latent_values(self) -> list[Tensor]:
        """The values of all sites that are not observed."""
        return [
            site["value"]
            for site in self.trace.nodes.values()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        ]

    def observes_in(self, plate: str) -> bool:
        """Whether there is an observation in a plate."""
        return any(
            is_observation(site) and any(frame.name == plate for frame in site["cond_indep_stack"])
            for site in self.trace.nodes.values()
        )


class _SubsampleMessenger(Messenger):
    """Provide the rows that plates would otherwise draw, and record where each plate's rows come from.

    Args:
        plates: the names of the plates to look at.
        rows: by plate the rows to provide; where some are missing, they are drawn.
        counts: by plate the number of rows that a plate given to the guide takes, where the model would take all.
    """

    def __init__(self, plates: Sequence[str], rows: Mapping[str, Tensor], counts: Mapping[str, int]):
        super().__init__()
        self.plates, self.rows, self.counts = plates, dict(rows), counts
        self.by_plate: dict[str, Subsample] = {}
        self.given: dict[str, Subsample] = {}
        self.drawn: dict[str, tuple[int, int]] = {}

    def _pyro_sample(self, msg):
        name = msg["name"]
        if not site_is_subsample(msg):
            return
        size, count, index = msg["fn"].size, msg["fn"].subsample_size, None
        if msg["value"] is not None:
            index = torch.as_tensor(msg["value"])
            self.given[name] = Subsample(size, index)
        elif name in self.plates and (count is not None and count < size or name in self.counts):
            count = self.counts.get(name, count)
            self.drawn[name] = (size, count)
            if name not in self.rows:
                self.rows[name] = torch.randperm(size, device=msg["fn"].device)[:count]
            index = msg["value"] = self.rows[name]
        if name in self.plates:
            self.by_plate[name] = Subsample(size, index)


def run_once(
    model: Callable,
    query: DataQuery,
    args: tuple,
    kwargs: Mapping,
    *,
    rows: Mapping[str, Tensor],
    counts: Mapping[str, int],
    seed: int,
    recorder: Recorder | None = None,
) -> Run:
    """Run the model apart from the program.

    Args:
        model, args, kwargs: the model and the call's arguments.
        query: what is to be read.
        rows: by plate the rows ``[B]`` to take where the model would draw its rows itself.
        counts: by plate the number of rows ``B`` that a plate given to the guide takes of it.
        seed: of all that the model draws.
        recorder: what records the run's tensor operations.

    Raises:
        ValueError: if a plate, or the observed value of a site, is missing, or positions are not those of rows.
    """
    given = _SubsampleMessenger(query.plates, rows, counts)
    # Validation reads data (`valid.all()`), which would be recorded as if the model did.
    with isolated_run(seed), pyro.validation_enabled(False), given, recorder or nullcontext():
        with explain_data_errors(args, kwargs):
            trace = poutine.trace(model).get_trace(*args, **kwargs)
            check_data(trace)
        values, masks, scales = {}, {}, {}
        for name in query.sites:
            site = trace.nodes.get(name)
            if site is not None and site["is_observed"]:
                values[name] = site["value"]
            elif not query.optional:
                raise ValueError(
                    f"Expected an observed value at site {name!r}, got none in this call.\n"
                    "An amortized guide reads the observations. Try one of the following fixes:\n"
                    "- pass them to the call\n- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
                )
        # Masks and scales are not needed of sites that only recognize a call.
        read = [] if query.optional else [*values]
        for name in [*read, *(name for name in query.latents if name in trace.nodes)]:
            site = trace.nodes[name]
            mask = site_mask(site)
            if mask is not None:
                masks[name] = mask
            if is_scaled(site):
                scales[name] = site["scale"]
    for name, subsample in given.given.items():
        check_positions(name, subsample.size, subsample.index, wait=recorder is not None)
    latents = {name: trace.nodes[name] for name in query.latents if name in trace.nodes}
    known = {name: site["value"] for name, site in latents.items() if site["is_observed"]}
    data = CallData(_all_plates(query, given.by_plate, trace), values, masks, scales, known)
    return Run(data, given.drawn, given.rows, trace)


def _all_plates(query: DataQuery, data: dict[str, Subsample], trace: Trace) -> dict[str, Subsample]:
    """The rows of all plates, in their order; those of a plate without a size are the ones that its sites have."""
    by_shape = sizes_by_shape(trace)
    known = data | {name: Subsample(size, None) for name, size in by_shape.items()}
    missing = [name for name in query.plates if name not in known]
    if missing:
        raise ValueError(f"Expected the plates {list(query.plates)} in every call of the model, got none of {missing}.")
    return {name: known[name] for name in query.plates}
