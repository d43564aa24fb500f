"""The sites of a trace: latents, observations, and the plates that they lie in."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_avi.inspection.data_errors import check_observed

__all__ = [
    "check_data",
    "equal",
    "give_sizes",
    "is_latent",
    "is_observation",
    "is_scaled",
    "plate_scale",
    "row_plate",
    "row_plates",
    "site_frames",
    "sizes_by_shape",
]


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is a latent that a guide has to provide."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("enumerate")
    )


def is_observation(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace is data: observed, and neither ``pyro.factor`` nor ``pyro.deterministic``."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
        and not isinstance(site["fn"], pyro.distributions.Unit)
    )


def check_data(trace: Trace) -> None:
    """Raise an error if a model observes a value that is not a tensor.

    Args:
        trace: of the model.
    """
    for name, site in trace.nodes.items():
        if is_observation(site):
            check_observed(name, site["value"])


def equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same, missing values (``nan``) included."""
    return (
        one.shape == two.shape
        and one.dtype == two.dtype
        and torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True)
    )


def row_plates(trace: Trace) -> list[str]:
    """The names of the plates that hold both a latent and an observation, sorted.

    Args:
        trace: a trace of the model.
    """

    def plates(wanted) -> set[str]:
        return {frame.name for site in trace.nodes.values() if wanted(site) for frame in site["cond_indep_stack"]}

    return sorted(plates(is_latent) & plates(is_observation))


def row_plate(trace: Trace) -> str | None:
    """The name of the plate that holds both a latent and an observation.

    Args:
        trace: a trace of the model.

    Raises:
        ValueError: if several plates do; the message lists them.
    """
    found = row_plates(trace)
    if len(found) > 1:
        raise ValueError(
            f"Expected one plate that holds both a latent and an observation, got {found}.\n"
            f"Choose those whose rows get factors of their own, for example plate={found[0]!r} or plate={tuple(found)!r}."
        )
    return found[0] if found else None


def plate_scale(frames: Iterable[CondIndepStackFrame]) -> float:
    """``N / B`` of all plates together: how many times a site in them counts."""
    scale = 1.0
    for frame in frames:
        scale *= (frame.full_size or frame.size) / frame.size
    return scale


def sizes_by_shape(trace: Trace) -> dict[str, int]:
    """The number of rows of each plate ``pyro.plate(name)`` without a size: the largest among its sites' batch shapes.

    Args:
        trace: of the model.
    """
    sizes: dict[str, int] = {}
    for site in trace.nodes.values():
        for frame in site_frames(site):
            if frame.size == -1:
                sizes[frame.name] = max(sizes.get(frame.name, 1), _extent(site, frame))
    return sizes


def _extent(site: Mapping[str, Any], frame: CondIndepStackFrame) -> int:
    """The size of a site's batch shape in the dimension of a plate."""
    batch = site["fn"].batch_shape
    return batch[frame.dim] if len(batch) >= -frame.dim else 1


def give_sizes(trace: Trace) -> frozenset[str]:
    """Write the numbers of rows into plates without a size, and leave out those in which a site has one value for all rows.

    Returns:
        The names of these plates.
    """
    sizes = sizes_by_shape(trace)
    for site in trace.nodes.values() if sizes else ():
        if not any(frame.name in sizes for frame in site_frames(site)):
            continue
        site["cond_indep_stack"] = tuple(
            frame._replace(size=sizes[frame.name], full_size=sizes[frame.name]) if frame.size == -1 else frame
            for frame in site_frames(site)
            if frame.size != -1 or _extent(site, frame) == sizes[frame.name]
        )
    return frozenset(sizes)


def is_scaled(site: Mapping[str, Any]) -> bool:
    """Whether a site counts more or less often than its plates say."""
    plain = plate_scale(site["cond_indep_stack"])
    return isinstance(site["scale"], Tensor) or abs(site["scale"] - plain) > 1e-6 * plain


def site_frames(site: Mapping[str, Any]) -> tuple[CondIndepStackFrame, ...]:
    """The plates around a sample site; none around any other site."""
    return tuple(site["cond_indep_stack"]) if site["type"] == "sample" else ()
