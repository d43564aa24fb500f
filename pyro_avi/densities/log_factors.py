"""The log joint of a trace as factors, its enumerated latents summed out."""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_avi.inspection.sites import give_sizes, is_latent

__all__ = [
    "LogFactor",
    "drawn_traces",
    "sample_enumerated",
    "enumeration_depth",
    "is_enumerated",
    "log_factors",
    "trace_at",
]


@dataclass(frozen=True)
class LogFactor:
    """One factor of a log joint.

    Attributes:
        sites: the names of its sites: one, or several that are tied by enumerated latents that were summed out.
        frames: its plates.
        value: the log density of each element of the plates, with the scale of the model, in double precision.
        is_latent: whether it is the density of a latent that is not enumerated.
    """

    sites: tuple[str, ...]
    frames: tuple[CondIndepStackFrame, ...]
    value: Tensor
    is_latent: bool = False

    def __str__(self) -> str:
        return ", ".join(map(repr, self.sites))


def enumeration_depth(model_trace: Trace, sampled: Collection[str]) -> int | None:
    """The number of dimensions of a model's plates, if it has latents to be enumerated; ``None`` if not.

    Args:
        model_trace: of the model, with values for all sites.
        sampled: the names of the sites that the guide samples.

    Raises:
        ValueError: if a latent is marked for sequential enumeration, which Pyro supports in guides only.
    """
    found = False
    for name, site in model_trace.nodes.items():
        kind = site["infer"].get("enumerate") if site["type"] == "sample" and not site["is_observed"] else None
        if kind is None or name in sampled:
            continue
        if kind != "parallel":
            raise ValueError(
                f'Expected latent {name!r} of the model to be enumerated in parallel, got infer={{"enumerate": {kind!r}}}.\n'
                'Write infer={"enumerate": "parallel"}, or let the guide sample it.'
            )
        found = True
    frames = [frame for site in model_trace.nodes.values() for frame in site.get("cond_indep_stack", ())]
    return max((-frame.dim for frame in frames if frame.vectorized), default=0) if found else None


def drawn_traces(
    model: Callable, guide: Callable | None, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Trace, Trace]:
    """Traces of the guide and of the model with the same latents, drawn from the guide; without one the first is empty."""
    guided = Trace() if guide is None else poutine.trace(guide).get_trace(*args, **kwargs)
    return guided, poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)


def trace_at(model: Callable, args: tuple, kwargs: Mapping[str, Any], given: Trace, *, depth: int | None) -> Trace:
    """A trace of the model with the values of another trace, and all values of its enumerated latents.

    Args:
        model, args, kwargs: the call.
        given: the values.
        depth: the number of dimensions of the plates, to the left of which enumerated values are; ``None``: no latent is
            enumerated.
    """
    if depth is not None:
        model = EnumMessenger(first_available_dim=-1 - depth)(model)
    return poutine.trace(poutine.replay(model, trace=given)).get_trace(*args, **kwargs)


def sample_enumerated(model: Callable, args: tuple, kwargs: Mapping[str, Any], given: Trace, *, depth: int) -> Trace:
    """A trace of the model with the values of another trace, and draws from the posterior of its enumerated latents.

    Args:
        model, args, kwargs: the call.
        given: the values of all other latents.
        depth: as for :func:`trace_at`.
    """
    # `infer_discrete` enumerates outside of the replay, where replayed sites are not told on which enumerated dimensions they
    # depend. They share their `infer` with the given trace: this run tells them.
    trace_at(model, args, kwargs, given, depth=depth)
    model = infer_discrete(poutine.replay(model, trace=given), first_available_dim=-1 - depth)
    return poutine.trace(model).get_trace(*args, **kwargs)


def log_factors(trace: Trace, *, exclude: Collection[str] = ()) -> list[LogFactor]:
    r"""The factors of a trace's log joint.

    Enumerated latents are summed out by Pyro's tensor contraction, within the plates that they are in,

    .. math:: \log \sum_k p(k) \, p(x_n \mid k, z_n)

    so that the factors add up to the log joint of the other sites.

    Args:
        trace: of a model or a guide.
        exclude: the names of sites to leave out.

    Raises:
        ValueError: if sites tied by an enumerated latent have different scales.
    """
    trace = prune_subsample_sites(trace)
    give_sizes(trace)
    trace.compute_log_prob()
    sites = [site for name, site in trace.nodes.items() if site["type"] == "sample" and name not in exclude]
    if not any(is_enumerated(site) for site in sites):
        return [_factor_of(site) for site in sites]
    trace.pack_tensors()
    symbols = {site["infer"]["_enumerate_symbol"] for site in sites if is_enumerated(site)}
    factors, tied = [], []
    for site in sites:
        # A site whose value was enumerated, or that depends on such a value.
        ties = is_enumerated(site) or not symbols.isdisjoint(site["packed"]["log_prob"]._pyro_dims)
        if ties:
            tied.append(site)
        else:
            factors.append(_factor_of(site))
    return factors + _summed_out(trace, tied, symbols)


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """Whether a site of a trace was enumerated: it has all of its values, to be summed out."""
    return not site["is_observed"] and site["infer"].get("_enumerate_dim") is not None


def _factor_of(site: Mapping[str, Any]) -> LogFactor:
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise ValueError(
                f"Expected a vectorized plate, got the sequential plate {frame.name!r}.\n"
                f"Write `with pyro.plate({frame.name!r}, size):` instead of `for i in pyro.plate(...)`."
            )
    value = torch.as_tensor(site["log_prob"]).double()
    return LogFactor((site["name"],), tuple(site["cond_indep_stack"]), value, is_latent(site))


def _summed_out(trace: Trace, sites: list[Mapping[str, Any]], symbols: set[str]) -> list[LogFactor]:
    """The factors of sites that depend on enumerated latents, after these were summed out."""
    _check_one_scale(sites)
    tree: OrderedDict[frozenset, list[Tensor]] = OrderedDict()
    frames = {trace.plate_to_symbol[f.name]: f for site in sites for f in site["cond_indep_stack"] if f.vectorized}
    for site in sites:
        term = site["packed"]["unscaled_log_prob"]
        if not is_enumerated(site):
            # A mask leaves an observation out. The probabilities of an enumerated latent stay in: without them its values
            # would be added up with weight 1 each.
            term = packed.scale_and_mask(term, mask=site["packed"]["mask"])
        ordinal = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        tree.setdefault(ordinal, []).append(term)
    left = contract_tensor_tree(tree, symbols, cache={})
    names, scale = tuple(site["name"] for site in sites), sites[0]["scale"]
    return [
        LogFactor(
            names,
            tuple(frames[symbol] for symbol in sorted(ordinal)),
            packed.unpack(packed.scale_and_mask(term, scale=scale), trace.symbol_to_dim).double(),
        )
        for ordinal, terms in left.items()
        for term in terms
    ]


def _check_one_scale(sites: list[Mapping[str, Any]]) -> None:
    scales = {site["name"]: float(site["scale"]) for site in sites}
    if len(set(scales.values())) > 1:
        raise ValueError(
            f"Expected sites tied by an enumerated latent to count equally often, got the scales {scales}.\n"
            "Put them into plates of which the same part is taken, and under the same poutine.scale."
        )
