"""Which of many numbers depend on which others, from probes that change or read several of them at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "TooIrregularError", "find_pairs"]

# Up to so many are probed one at a time, and up to the second number where nothing simpler describes them.
_FEW, _MOST = 64, 512
# Large groups show a single row that breaks a rule, small ones what large groups would cover.
_SINGLES, _GROUPS = 6, torch.tensor([0.5] * 12 + [0.05] * 4)[:, None]


class TooIrregularError(ValueError):
    """A pattern has no simple description, and there are too many rows to look at each."""

    def __init__(self):
        super().__init__(
            f"which of more than {_FEW} rows depend on which data follows no rule; call with at most {_FEW} rows"
        )


@dataclass(frozen=True)
class Block:
    """A part of the numbers that a probe responds with.

    Attributes:
        start, stop: where it is among them.
        rows: ``[stop - start]`` for each the position that it belongs to among those that are probed; ``None`` if nothing
            relates them.
        connects: whether only that matters which are connected, so that of many pairs a few that connect them will do.
    """

    start: int
    stop: int
    rows: Tensor | None
    connects: bool = False


def find_pairs(respond: Callable[[Tensor], Tensor], count: int, blocks: Sequence[Block]) -> list[Tensor | None]:
    """The pairs ``[2, E]`` of what is probed and what responds, for each block; ``None`` if there are too many to find them.

    Few are probed one at a time. Of many some are probed alone: where each of these responds at the same distances, or
    everywhere, it is taken for the rule, and probes of random groups have to agree.

    Args:
        respond: from ``[L, count]`` booleans, what each probe takes, to ``[L, M]`` booleans, what responds.
        count: how many can be probed.
        blocks: the parts of the ``M``.

    Example::

        >>> import torch
        >>> from pyro_avi.sufficiency.patterns import Block, find_pairs
        >>> shifted = lambda chosen: chosen.roll(1, 1)
        >>> find_pairs(shifted, 3, [Block(0, 3, torch.arange(3))])[0].tolist()
        [[0, 1, 2], [1, 2, 0]]
    """
    if count <= _FEW:
        return _one_at_a_time(respond, count, blocks)
    ends = [*range(_SINGLES // 2), *range(count - _SINGLES // 2, count)]
    alone = torch.cat([torch.tensor(ends), torch.randperm(count - _SINGLES)[:_SINGLES] + _SINGLES // 2])
    chosen = torch.zeros(len(alone), count, dtype=torch.bool)
    chosen[torch.arange(len(alone)), alone] = True
    groups = torch.rand(len(_GROUPS), count) < _GROUPS
    responses = respond(torch.cat([chosen, groups]))
    singles, grouped = responses[: len(alone)], responses[len(alone) :]
    found = [_rule(block, alone, singles, groups, grouped) for block in blocks]
    if count <= _MOST and any(each is None for each in found):
        return _one_at_a_time(respond, count, blocks)
    return found


def _one_at_a_time(respond, count: int, blocks: Sequence[Block]) -> list[Tensor | None]:
    responses = respond(torch.eye(count, dtype=torch.bool))
    return [responses[:, block.start : block.stop].nonzero().T for block in blocks]


def _rule(block: Block, alone: Tensor, singles: Tensor, groups: Tensor, grouped: Tensor) -> Tensor | None:
    """The pairs of a block by a rule; ``None`` if none describes it."""
    count, singles, grouped = (
        groups.shape[1],
        singles[:, block.start : block.stop],
        grouped[:, block.start : block.stop],
    )
    if not singles.any() and not grouped.any():
        return torch.zeros(2, 0, dtype=torch.long)
    if bool((singles == singles[0]).all()) and bool((grouped == singles[0]).all()) and int(singles[0].sum()) > 2:
        return _everything(count, singles[0].nonzero().flatten(), connects=block.connects)
    if block.rows is None:
        return None
    at, responding = singles.nonzero(as_tuple=True)
    offsets = (block.rows[responding] - alone[at]).unique().tolist()
    if len(offsets) > 2 * _FEW:
        return None
    columns = torch.arange(len(block.rows))
    pairs, predicted = [], torch.zeros_like(grouped)
    for offset in offsets:
        source = block.rows - offset
        inside = (source >= 0) & (source < count)
        pairs.append(torch.stack([source[inside], columns[inside]]))
        predicted[:, inside] |= groups[:, source[inside]]
    expected = torch.zeros_like(singles)
    for offset in offsets:
        expected |= block.rows == (alone + offset)[:, None]
    if not torch.equal(expected, singles) or not torch.equal(predicted, grouped):
        return None
    return torch.cat(pairs, 1)


def _everything(count: int, columns: Tensor, *, connects: bool) -> Tensor | None:
    if count * len(columns) <= 1_000_000:
        return torch.cartesian_prod(torch.arange(count), columns).T
    if connects:
        first, rows = torch.zeros(len(columns), dtype=torch.long), torch.arange(count)
        return torch.cat([torch.stack([first, columns]), torch.stack([rows, columns[:1].expand(count)])], 1)
    return None
