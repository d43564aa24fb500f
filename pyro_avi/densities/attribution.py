"""The independent blocks of rows that the elements of a log joint belong to."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_avi.densities.blocks import Attribution, Owners
from pyro_avi.densities.dependence import row_codes
from pyro_avi.densities.kept import Kept
from pyro_avi.densities.log_factors import LogFactor
from pyro_avi.densities.perturbation import PerturbedCall, Plates, row_frames
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.sites import plate_scale
from pyro_avi.seeds import seeded

__all__ = ["Attribution", "attribute", "check_attribution"]

# With up to 70 blocks this many evaluations find every element of a wrong block, with more nearly every one.
_MOST_CHECKS = 8
# Evaluations that check an answer which is kept from a call of the same program.
_CHECKS_OF_KEPT = 2
_KEPT: Kept["Attribution"] = Kept()


def attribute(
    model: Callable,
    guide: Callable | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    plates: Plates,
    *,
    exclude: Sequence[str] = (),
    traces: tuple[Trace, Trace] | None = None,
) -> Attribution:
    """Find the independent blocks of rows of a call, and which elements of its log joint belong to them.

    The latents of some rows at a time are changed: the elements that then change depend on them. This needs no knowledge of
    how the model computes. The result is checked by another change (:func:`check_attribution`).

    It is kept for further calls of the same program (:class:`~pyro_avi.densities.program_digest.ProgramDigest`). There it is
    checked again, by fewer changes, and found anew where it does not hold.

    Args:
        model, args, kwargs: a call of any Pyro callable.
        guide: any Pyro guide for it; ``None`` to analyse the model alone.
        plates: the names of the plates of the rows; none for a call that is one row.
        exclude: observed sites of the model to leave out.
        traces: of the guide and of the model with the guide's latents, where they are at hand.

    Raises:
        ValueError: if there are no sites in the plates, or the result does not hold.
    """
    with isolated_run(0):
        call = PerturbedCall(model, guide, args, kwargs, plates, exclude=exclude, traces=traces)
        kept, uses = _KEPT.look_up(call.digest)
        if kept is not None:
            # Other changes at every use.
            with seeded(uses):
                holds = not any(_faults(call, kept, _CHECKS_OF_KEPT, guided=not call.is_product))
            if holds:
                return kept.copy()
        result = _find(call)
        check_attribution(call, result)
        _KEPT.keep(call.digest, result.copy(), result.num_bytes)
    return result


def _find(call: PerturbedCall) -> Attribution:
    factors = (call.model_factors, call.guide_factors)
    rows, ties, tying = call.dependent_rows()
    homes = torch.cat([_home(call, factor) for part in factors for factor in part])
    row_of_element = torch.where((rows < 0).all(0), homes, rows.amax(0))
    numbers = _components(call.num_rows, rows, ties)
    num_blocks = int(numbers.max()) + 1
    owners = torch.where(row_of_element < 0, -1, numbers[row_of_element])
    split = iter(owners.split([factor.value.numel() for part in factors for factor in part]))
    of_model, of_guide = ([Owners(next(split).reshape(call.padded(x)), num_blocks) for x in part] for part in factors)
    by_factor = (of_model, of_guide)
    scale, is_estimate = _scales(call, by_factor)
    return Attribution(
        blocks=dict(zip(call.row_sets, numbers.split(list(call.sizes)), strict=True)),
        num_blocks=num_blocks,
        scale=scale,
        has_globals=call.has_globals,
        is_estimate=is_estimate,
        owners=by_factor,
        sites=frozenset(
            name
            for factor, each in zip(call.model_factors, by_factor[0], strict=True)
            if each.any
            for name in factor.sites
        ),
        ties=tuple(call.sites_of(tying)) if num_blocks < call.num_rows else (),
    )


def _home(call: PerturbedCall, factor: LogFactor) -> Tensor:
    """The row of each element by its position in the plates, for elements that depend on no latent; -1 outside of them."""
    if not call.row_sets or not call.plates:
        return torch.zeros(factor.value.numel(), dtype=torch.long)
    inside = {frame.name for frame in row_frames(factor.frames, call.plates)}
    sets = [(plates, frames) for plates, frames in call.row_sets.items() if set(plates) <= inside]
    if not sets:
        return torch.full((factor.value.numel(),), -1)
    plates, frames = max(sets, key=lambda each: len(each[0]))
    shape = call.padded(factor)
    if any(shape[frame.dim] != frame.size for frame in frames):
        return torch.full((factor.value.numel(),), -1)
    return (call.positions(plates) + call.offset(plates)).expand(shape).flatten()


def _components(count: int, rows: Tensor, ties: Sequence[Tensor]) -> Tensor:
    """``[R]`` the connected component of each row, where rows are connected that one element depends on."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = [torch.stack([one, two])[:, (one >= 0) & (two >= 0)] for one, two in zip(rows, rows[1:], strict=False)]
    # An element may depend on rows of the first and of the third set alone.
    pairs += [torch.stack([rows[0], each])[:, (rows[0] >= 0) & (each >= 0)] for each in rows[2:]]
    pairs += [torch.stack([tied[:1].expand(len(tied)), tied]) for tied in ties]
    one, two = torch.cat(pairs, 1).unique(dim=1).numpy() if pairs else torch.zeros(2, 0, dtype=torch.long).numpy()
    graph = coo_array((torch.ones(len(one)).numpy(), (one, two)), shape=(count, count))
    labels = torch.from_numpy(connected_components(graph, directed=False)[1]).long()
    # Numbered in the order of their first rows.
    first = torch.full((int(labels.max()) + 1,), count).scatter_reduce(0, labels, torch.arange(count), "amin")
    return first.argsort().argsort()[labels]


def _scales(call: PerturbedCall, owners: tuple[list[Owners], list[Owners]]) -> tuple[float, bool]:
    """The scale of a block, and whether other plates subsample their rows."""
    inside, all_plates = set(), set()
    for factors, parts in zip((call.model_factors, call.guide_factors), owners, strict=True):
        for factor, own in zip(factors, parts, strict=True):
            if own.any:
                all_plates.add(_scale_of(factor.frames))
                inside.add(_scale_of(row_frames(factor.frames, call.plates)))
    if len(inside) > 1:
        # The scale of factors that are in other plates only.
        inside.discard(1.0)
    scale = inside.pop() if len(inside) == 1 else 1.0
    return scale, any(abs(other - scale) > 1e-6 * scale for other in all_plates)


def _scale_of(frames: Iterable[CondIndepStackFrame]) -> float:
    """``N / B`` of plates together, rounded so that equal ones compare equal."""
    return round(plate_scale(frames), 9)


def check_attribution(call: PerturbedCall, found: Attribution) -> None:
    """Check that blocks and the rest add up to the log joint, and that blocks depend on no latents but their own.

    Args:
        call: the call that was analysed.
        found: how its log joint splits.

    Raises:
        ValueError: if that does not hold; the message names the sites.
    """
    other, wrong = _faults(call, found, _MOST_CHECKS, guided=True)
    if other:
        raise ValueError(
            f"Expected the parts of rows and globals to add up to the log joint, got another sum at sites {sorted(set(other))}."
            "\nThis is a fault of pyro_avi: please report the model."
        )
    if wrong:
        raise ValueError(
            f"Expected densities of rows that depend on no other rows' latents, got others at {sorted(set(wrong))}.\n"
            "Name all plates whose rows the sites tie, plate=(..., ...), or report the model: the rows were not told apart."
        )


def _faults(call: PerturbedCall, found: Attribution, num_checks: int, *, guided: bool) -> tuple[list[str], list[str]]:
    """The sites whose parts do not add up to the log joint, and those where blocks depend on other blocks' latents."""
    wrong: list[str] = []
    other = list(call.unaccounted())
    # In another order than in the search. For any two blocks there is an evaluation that changes one and not the other.
    codes = row_codes(found.num_blocks)[torch.randperm(found.num_blocks)]
    for chosen in codes.T[:num_checks]:
        again = call.with_changed({plates: chosen[blocks] for plates, blocks in found.blocks.items()}, guided=guided)
        kept = torch.cat([~chosen, torch.tensor([True])]).to(call.device)
        for is_guide, factors in enumerate((call.model_factors, call.guide_factors if guided else [])):
            for i, factor in enumerate(factors):
                one, two = (_parts(values, found, is_guide, i) for values in (factor.value, again[is_guide][i].value))
                if not torch.allclose(one.sum(), factor.value.sum(), rtol=1e-6, atol=1e-6, equal_nan=True):
                    other += factor.sites
                elif not bool(call.same(one, two)[kept].all()):
                    wrong += factor.sites
    return other, wrong


def _parts(value: Tensor, found: Attribution, is_guide: int, position: int) -> Tensor:
    """``[M + 1]`` the parts of one factor, scaled: of each block, and the rest."""
    blocks, rest = found.owners[is_guide][position].sums(value)
    zero = value.new_zeros(())
    blocks = zero.expand(found.num_blocks) if blocks is None else blocks
    return torch.cat([blocks, (zero if rest is None else rest).reshape(1)])
