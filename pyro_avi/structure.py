"""What a model consists of: local and global latents, the plate of its rows, what it observes there."""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_avi.parameters import own_parameters

__all__ = ["Latent", "Structure", "equal", "inspect_model", "is_latent", "is_observation", "quiet", "row_plate"]


@contextmanager
def quiet(seed: int | None = None):
    """Run a model or guide beside the program: hidden from handlers, without gradients, random state given back."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), poutine.block(), own_parameters():
        if seed is not None:
            torch.manual_seed(seed)
        yield


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


def equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same, missing values (``nan``) included."""
    return (
        one.shape == two.shape
        and one.dtype == two.dtype
        and torch.allclose(one, two, rtol=0.0, atol=0.0, equal_nan=True)
    )


@dataclass(frozen=True)
class Latent:
    """A latent site of a model.

    Attributes:
        name: the site's name.
        frames: the plates that hold it, innermost last.
        support: its constraint.
        event_dim: the number of its event dimensions.
        initial: its initial value in unconstrained coordinates, ``batch_shape + unconstrained event shape``.
        unconstrained_event_dim: the number of event dimensions of ``initial``.
    """

    name: str
    frames: tuple[CondIndepStackFrame, ...]
    support: constraints.Constraint
    event_dim: int
    initial: Tensor
    unconstrained_event_dim: int

    @property
    def is_real(self) -> bool:
        """Whether the support is the whole real space, so that no transform is needed."""
        support = self.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support is constraints.real

    def to_support(self, value: Tensor) -> Tensor:
        """Map unconstrained coordinates to the support."""
        return value if self.is_real else biject_to(self.support)(value)


@dataclass(frozen=True)
class Structure:
    """The parts of a model for one choice of the plate whose rows get local factors.

    Attributes:
        plate: the frame of that plate, ``None`` where every latent is global.
        local_latents: the latents inside the plate.
        global_latents: the latents outside it.
        observations: the sites observed in the plate; for each the dimension of its value that holds the rows.
    """

    plate: CondIndepStackFrame | None
    local_latents: tuple[Latent, ...]
    global_latents: tuple[Latent, ...]
    observations: Mapping[str, int]


def row_plate(trace: Trace) -> str | None:
    """The name of the plate that holds both a latent and an observation.

    Args:
        trace: a trace of the model.

    Raises:
        ValueError: if several plates do; the message lists them.
    """

    def plates(wanted) -> set[str]:
        return {frame.name for site in trace.nodes.values() if wanted(site) for frame in site["cond_indep_stack"]}

    found = sorted(plates(is_latent) & plates(is_observation))
    if len(found) > 1:
        raise ValueError(
            f"Expected one plate that holds both a latent and an observation, got {found}.\n"
            "Choose the one whose rows get factors of their own, for example plate={!r}.".format(found[0])
        )
    return found[0] if found else None


def inspect_model(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    plate: str | Callable[[Trace], str | None] | None,
    init_loc_fn: Callable,
) -> Structure:
    """Run a model twice with different latents and report what it consists of.

    Args:
        model: any Pyro callable.
        args: its positional arguments.
        kwargs: its keyword arguments.
        plate: the name of the plate whose rows are local, or a function from a trace of the model to it; ``None`` where
            all latents are global.
        init_loc_fn: gives each latent's initial value, as in :mod:`pyro.infer.autoguide.initialization`.

    Raises:
        ValueError: if the plate does not exist, is sequential, or if sites, shapes or supports change with the latents.
    """
    with quiet():
        trace = poutine.trace(InitMessenger(init_loc_fn)(model)).get_trace(*args, **kwargs)
        again = poutine.trace(poutine.replay(model, trace=_rows(trace))).get_trace(*args, **kwargs)
    _check_static(trace, again)
    for name, site in list(trace.nodes.items()):
        # A value that follows the latents is computed by the model; it is no data.
        if is_observation(site) and not equal(site["value"], again.nodes[name]["value"]):
            trace.remove_node(name)
    frames = {frame.name: frame for site in trace.nodes.values() for frame in _frames(site)}
    if callable(plate):
        plate = plate(trace)
    elif plate is not None and plate not in frames:
        raise ValueError(f"Expected plate= to name one of the model's plates {sorted(frames)}, got {plate!r}.")
    latents = {name: _latent(name, site) for name, site in trace.nodes.items() if is_latent(site)}
    local = tuple(x for x in latents.values() if plate in [frame.name for frame in x.frames])
    for latent in local:
        _check_row_local(latent, trace.nodes[latent.name], plate)
    return Structure(
        plate=frames.get(plate),
        local_latents=local,
        global_latents=tuple(x for x in latents.values() if x not in local),
        observations={
            name: frame.dim - site["fn"].event_dim
            for name, site in trace.nodes.items()
            for frame in _frames(site)
            if frame.name == plate and is_observation(site)
        },
    )


def _rows(trace: Trace) -> Trace:
    """The plates' rows alone, so that a second run with other latents works on the same data."""
    rows = Trace()
    for name, site in trace.nodes.items():
        if site_is_subsample(site):
            rows.add_node(name, **site)
    return rows


def _frames(site: Mapping[str, Any]) -> tuple[CondIndepStackFrame, ...]:
    return tuple(site["cond_indep_stack"]) if site["type"] == "sample" else ()


def _latent(name: str, site: Mapping[str, Any]) -> Latent:
    fn, value = site["fn"], site["value"]
    for frame in _frames(site):
        if not frame.vectorized:
            raise ValueError(
                f"Expected vectorized plates around latent {name!r}, got the sequential plate {frame.name!r}.\n"
                f"Write `with pyro.plate({frame.name!r}, size):` instead of `for i in pyro.plate(...)`."
            )
    with helpful_support_errors(site):
        initial = value.detach() if fn.support is constraints.real else biject_to(fn.support).inv(value.detach())
    return Latent(
        name=name,
        frames=_frames(site),
        support=fn.support,
        event_dim=fn.event_dim,
        initial=initial.detach().clone(),
        unconstrained_event_dim=fn.event_dim + initial.dim() - value.dim(),
    )


def _check_row_local(latent: Latent, site: Mapping[str, Any], plate: str) -> None:
    scale = 1.0
    for frame in latent.frames:
        full_size = frame.full_size or frame.size
        scale *= full_size / frame.size
        if frame.name != plate and full_size != frame.size:
            raise ValueError(
                f"Expected plate {frame.name!r} of latent {latent.name!r} to have a fixed size inside a row of plate "
                f"{plate!r}, got {frame.size} of {full_size} rows."
            )
    if site["mask"] is not None or abs(float(site["scale"]) - scale) > 1e-6 * scale:
        raise ValueError(
            f"Expected latent {latent.name!r} without poutine.mask and poutine.scale, got mask={site['mask']} and scale="
            f"{site['scale']} (its plates account for {scale:g}).\nMask or scale the observations instead."
        )


def _check_static(trace: Trace, again: Trace) -> None:
    names, names_again = ({n for n, s in t.nodes.items() if s["type"] == "sample"} for t in (trace, again))
    if names != names_again:
        raise ValueError(
            f"Expected the same sites in every run of the model, got {sorted(names ^ names_again)} in one of two only.\n"
            "A guide needs sites that do not depend on the values of latents."
        )
    for name in sorted(names):
        one, two = trace.nodes[name], again.nodes[name]
        if not is_latent(one):
            continue
        # Compared as text: two constraints of one kind with equal bounds are different objects.
        described = [
            (tuple(s["fn"].event_shape), tuple(s["fn"].batch_shape), repr(s["fn"].support)) for s in (one, two)
        ]
        if described[0] != described[1]:
            raise ValueError(
                f"Expected latent {name!r} with one event shape, batch shape and support in every run of the model, got "
                f"{described[0]} and {described[1]}.\nA guide needs a support that does not depend on other latents."
            )
