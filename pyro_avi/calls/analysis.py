"""The analysis of the first call of a signature: whether its data can be replayed from the arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_avi.calls.model_run import CallData, DataQuery, Run, run_once
from pyro_avi.calls.readers import ReplayReader, RerunReader, targets
from pyro_avi.calls.replay import CannotReplayError, Recorder, Replay, dependents
from pyro_avi.calls.signature import flatten
from pyro_avi.inspection.masks import Mask
from pyro_avi.inspection.sites import equal, is_latent, is_observation, row_plates

__all__ = ["analyse_call"]


def analyse_call(
    model: Callable,
    query: DataQuery,
    args: tuple,
    kwargs: Mapping[str, Any],
    counts: Mapping[str, int],
    warn: Callable[[str], None],
) -> ReplayReader | RerunReader:
    """Run a model once and find out how the data of calls like this one are read.

    Args:
        model, args, kwargs: the model and the arguments of the call.
        query: what is to be read.
        counts: by plate the number of rows ``B`` that a plate given to the guide takes of it.
        warn: called with the reason if the model has to run at every call.

    Raises:
        ValueError: if two runs of the model give other data, a mask depends on latents, or the model observes what it did not.
    """
    recorder = Recorder()
    # With new identities, as the model may hold an argument itself, or be given one tensor in two places.
    args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    run = run_once(model, query, args, kwargs, rows={}, counts=counts, seed=0, recorder=recorder)

    def again(seed: int) -> CallData:
        return run_once(model, query, args, kwargs, rows=run.rows, counts=counts, seed=seed).data

    _check_followed(query, run, recorder, again)
    data, other = run.data, again(1)
    if query.optional:
        # Values that the model draws or computes are not data.
        data, other = _repeated(data, other), _repeated(other, data)
        if run.drawn:
            data, other = replace(data, values={}), replace(other, values={})
    _check_repeats(query, data, other)
    ignored = tuple(name for name in run.drawn if name not in counts and _ignores(run, recorder, name))
    # The objects whose identity is part of the signature must outlive it.
    leaves, _ = flatten(args, kwargs)
    keep = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    inputs = [*leaves, *(run.rows[name] for name in run.drawn)]

    def replayed(data: CallData) -> ReplayReader:
        replay = Replay(recorder, inputs, targets(data))
        if not _same(replay(inputs), targets(data)):
            raise CannotReplayError("its operations do not repeat")
        return ReplayReader(run, data, ignored, replay, keep)

    try:
        return replayed(data)
    except CannotReplayError as error:
        reason = error
    # The observed values may be the only part that cannot be replayed.
    try:
        rest = replayed(replace(data, values={})) if data.values else None
    except CannotReplayError:
        rest = None
    if query.optional:
        if rest is not None:
            return rest
        query = replace(query, sites=())
    warn(_advice(query, data, rest is None, reason))
    return RerunReader(model, query, counts, run, ignored, keep)


def _advice(query: DataQuery, data: CallData, rows: bool, reason: Exception) -> str:
    """The advice for a model that has to run at every call, because of its rows or of its observed values alone."""
    if not query.plates:
        what = f"What masks and scales the {query}"
    else:
        sites = f"observed values {list(query.sites)}" if query.sites else ""
        what = f"The {' and '.join(['rows'] * rows + [sites] * bool(sites))} of {query}"
    fix = "Pass the data as tensor arguments"
    if query.inputs and not rows:
        fix += ", or tell the guide what to read: inputs=lambda *args, **kwargs: ..."
    elif query.inputs and not data.masks and not data.scales:
        fix += (
            ", or tell the guide both what to read, inputs=lambda *args, **kwargs: ..., and which rows, "
            "create_plates=lambda *args, **kwargs: pyro.plate(name, size, subsample=index)"
        )
    return (
        f"{what} could not be traced to the model's arguments ({reason}), so every call runs the model once more to read "
        f"them.\n{fix}"
    )


def _ignores(run: Run, recorder: Recorder, plate: str) -> bool:
    """Whether a model draws rows of a plate and does not use them, though it observes something there."""
    made, reader = dependents(recorder.calls, [run.rows[plate]])
    return len(made) == 1 and reader is None and run.observes_in(plate)


def _check_followed(query: DataQuery, run: Run, recorder: Recorder, again: Callable[[int], CallData]) -> None:
    """Raise an error if masks depend on latents, or there are observations where there were none."""
    of_latents, reader = dependents(recorder.calls, run.latent_values)
    nodes = run.trace.nodes
    for name, mask in run.data.masks.items():
        if id(mask.values) in of_latents:
            raise _following_mask(name, is_latent(nodes[name]))
    # A mask that depends on a latent by way of a Python value may be the same in two runs.
    for seed in range(2, 10) if reader is not None else ():
        masks = again(seed).masks
        for name in {*run.data.masks, *masks}:
            if not _equal(*(each.get(name, Mask(True)).values for each in (run.data.masks, masks))):
                raise _following_mask(name, is_latent(nodes[name]))
    if query.unobserved and row_plates(run.trace):
        names = [name for name, site in nodes.items() if is_observation(site) and id(site["value"]) not in of_latents]
        if names:
            raise ValueError(
                f"Expected no observations, as in the call that this guide was set up with, got values at sites {names}.\n"
                "Without observations every latent was taken for a global one. Make a new guide and set it up with the "
                "data: guide.setup(*args)."
            )


def _following_mask(name: str, latent: bool) -> ValueError:
    if latent:
        return ValueError(
            f"Expected a mask of latent {name!r} that does not depend on latents, got one that does.\n"
            "A guide leaves out what the model leaves out, and it cannot know that before it has drawn the latents. Try one "
            "of the following fixes:\n"
            "- mask by the data, or by an argument of the model\n"
            f"- leave {name!r} without a mask, and mask what depends on it: where nothing does, it keeps its prior"
        )
    return ValueError(
        f"Expected a mask of observed site {name!r} that does not depend on latents, got one that does: the encoder cannot "
        "read it.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
    )


def _repeated(data: CallData, again: CallData) -> CallData:
    values = {name: value for name, value in data.values.items() if _same([value], [again.values.get(name)])}
    return replace(data, values=values)


def _same(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether two lists of tensors and numbers are equal."""
    return len(one) == len(two) and all(_equal(a, b) for a, b in zip(one, two, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _check_repeats(query: DataQuery, data: CallData, again: CallData) -> None:
    names = [
        (
            {name: rows.size for name, rows in each.rows.items()},
            *(list(part) for part in (each.values, each.masks, each.scales, each.given)),
        )
        for each in (data, again)
    ]
    if names[0] != names[1] or not _same(targets(data), targets(again)):
        raise ValueError(
            f"Expected the same rows, observed values, masks and scales of {query} in two runs of the model on the same "
            "arguments, got different ones.\nA guide cannot know rows or data that the model draws at random. Draw them "
            "outside and pass them as arguments, or use pyro.plate(name, size, subsample_size=...)."
        )
