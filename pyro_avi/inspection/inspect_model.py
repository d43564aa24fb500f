"""The structure of a model, found by two runs with different latents."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_avi.inspection.data_errors import explain_data_errors
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.masks import site_mask
from pyro_avi.inspection.sites import (
    check_data,
    equal,
    give_sizes,
    is_latent,
    is_observation,
    is_scaled,
    plate_scale,
    site_frames,
)
from pyro_avi.inspection.structure import Latent, RowSet, Structure
from pyro_avi.inspection.supports import (
    is_like,
    num_values,
    support_of,
    support_of_components,
    unwrapped,
    without_equal_rows,
)

__all__ = ["inspect_model"]


def inspect_model(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    plates: Sequence[str] | Callable[[Trace], Sequence[str]],
    init_loc_fn: Callable,
) -> Structure:
    """Run a model twice with different latents and return its structure.

    Args:
        model: any Pyro callable.
        args: its positional arguments.
        kwargs: its keyword arguments.
        plates: the names of the plates whose rows are local, or a function from a trace of the model to them; none where
            all latents are global.
        init_loc_fn: gives each latent's initial value, as in :mod:`pyro.infer.autoguide.initialization`.

    Raises:
        ValueError: if a plate does not exist, is sequential, or if sites, shapes or supports change with the latents.
    """
    with isolated_run(), explain_data_errors(args, kwargs):
        trace = poutine.trace(InitMessenger(_but_discrete(init_loc_fn))(model)).get_trace(*args, **kwargs)
        check_data(trace)
        again = poutine.trace(poutine.replay(model, trace=_rows(trace))).get_trace(*args, **kwargs)
    _check_static(trace, again)
    without_size = give_sizes(trace)
    for name, site in list(trace.nodes.items()):
        # A value that follows the latents is computed by the model; it is no data.
        if is_observation(site) and not equal(site["value"], again.nodes[name]["value"]):
            trace.remove_node(name)
    frames = {frame.name: frame for site in trace.nodes.values() for frame in site_frames(site)}
    if callable(plates):
        plates = plates(trace)
    for plate in plates:
        if plate not in frames:
            raise ValueError(f"Expected plate= to name one of the model's plates {sorted(frames)}, got {plate!r}.")
    latents = [_latent(name, site) for name, site in trace.nodes.items() if is_latent(site)]
    observed = {name: site for name, site in trace.nodes.items() if is_observation(site)}
    members: dict[tuple[str, ...], list[Latent]] = {}
    for latent in latents:
        chosen = sorted((frame for frame in latent.frames if frame.name in plates), key=lambda frame: frame.dim)
        members.setdefault(tuple(frame.name for frame in chosen), []).append(latent)
        if chosen:
            _check_fixed(latent, [frame.name for frame in chosen])
            _check_support(latent, chosen)
    global_latents = members.pop((), [])
    return Structure(
        row_sets=tuple(_row_set([frames[name] for name in names], group, observed) for names, group in members.items()),
        global_latents=tuple(global_latents),
        observations=tuple(observed),
        order=tuple(latent.name for latent in latents),
        without_size=without_size,
    )


def _but_discrete(init_loc_fn: Callable) -> Callable:
    """Initial values for continuous sites, a draw for discrete ones."""

    def initial(site):
        support = support_of_components(site["name"], site["fn"].support)
        return site["fn"].sample() if support.is_discrete else init_loc_fn(site)

    return initial


def _row_set(frames: list[CondIndepStackFrame], latents: list[Latent], observed: Mapping[str, Mapping]) -> RowSet:
    names = {frame.name for frame in frames}
    observations, subsampled, supports = {}, {}, {}
    for name, site in observed.items():
        others = [frame for frame in site_frames(site) if frame.name not in names]
        if len(site_frames(site)) - len(others) == len(frames):
            observations[name] = tuple(frame.dim - site["fn"].event_dim for frame in frames)
            supports[name] = support_of(site["fn"])
            subsampled[name] = tuple(frame.name for frame in others if plate_scale([frame]) != 1.0)
    return RowSet(tuple(frames), tuple(latents), observations, subsampled, supports)


def _rows(trace: Trace) -> Trace:
    """A trace of the plates' rows only, so that a second run with other latents works on the same data."""
    rows = Trace()
    for name, site in trace.nodes.items():
        if site_is_subsample(site):
            rows.add_node(name, **site)
    return rows


def _latent(name: str, site: Mapping[str, Any]) -> Latent:
    fn, value = site["fn"], site["value"].detach()
    for frame in site_frames(site):
        if not frame.vectorized:
            raise ValueError(
                f"Expected vectorized plates around latent {name!r}, got the sequential plate {frame.name!r}.\n"
                f"Write `with pyro.plate({frame.name!r}, size):` instead of `for i in pyro.plate(...)`."
            )
    count, support = num_values(name, fn), without_equal_rows(support_of_components(name, fn.support))
    if count is not None:
        initial, event_dim = value, fn.event_dim
    else:
        with helpful_support_errors(site):
            initial = value if is_like(support, constraints.real) else biject_to(support).inv(value)
        event_dim = fn.event_dim + initial.dim() - value.dim()
    return Latent(
        name=name,
        frames=site_frames(site),
        support=support,
        event_dim=fn.event_dim,
        initial=initial.detach().clone(),
        unconstrained_event_dim=event_dim,
        num_values=count,
        is_weighted=site_mask(site) is not None or is_scaled(site),
        dtype=initial.dtype if count is None else fn.log_prob(value).dtype,
    )


def _check_fixed(latent: Latent, plates: Sequence[str]) -> None:
    """Raise an error if a row holds a subsample of another plate: its factor would have no fixed size."""
    for frame in latent.frames:
        if frame.name not in plates and plate_scale([frame]) != 1.0:
            raise ValueError(
                f"Expected plate {frame.name!r} of latent {latent.name!r} to have a fixed size inside a row of plate "
                f"{', '.join(map(repr, plates))}, got {frame.size} of {frame.full_size} rows.\n"
                f"Give its rows factors of their own: plate={(*plates, frame.name)!r}."
            )


def _check_support(latent: Latent, frames: Sequence[CondIndepStackFrame]) -> None:
    """Raise an error if the bounds of a support differ by row."""
    support, _ = unwrapped(latent.support)
    for bound in vars(support).values():
        dims = [frame.dim - latent.event_dim for frame in frames]
        if isinstance(bound, Tensor) and any(-dim <= bound.dim() and bound.shape[dim] > 1 for dim in dims):
            raise ValueError(
                f"Expected latent {latent.name!r} with one support for all rows of plate "
                f"{', '.join(repr(frame.name) for frame in frames)}, got {support!r} with bounds that differ by row.\n"
                "Sample on a fixed support and move it: u = pyro.sample(name, dist.Uniform(0, 1)); "
                "pyro.deterministic(other_name, low + (high - low) * u)."
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
