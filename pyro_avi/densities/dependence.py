"""Which rows a number depends on, from few evaluations at which many rows are changed at once."""

import itertools
from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

__all__ = ["find_rows", "row_codes"]

# More different sets of tied rows than these are merged into one, as those of a long series.
_MOST_SETS = 2_000


def row_codes(count: int) -> Tensor:
    """``[R, L]`` a code of ``L`` bits for each of ``R`` rows: half of them set, no two alike.

    In the evaluation of a bit all rows with that bit set are changed together. As no code covers another, a number that
    depends on one row changes in exactly the evaluations of that row's code, and a number that depends on several rows in
    more evaluations than a code has bits set. ``L`` is about ``log2(R) + log2(log2(R)) / 2``.

    Args:
        count: ``R``.

    Example::

        >>> from pyro_avi.densities.dependence import row_codes
        >>> row_codes(4).int().tolist()
        [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]
        >>> row_codes(10_000).shape
        torch.Size([10000, 16])
    """
    bits = next(bits for bits in itertools.count(1) if comb(bits, (bits + 1) // 2) >= count)
    chosen = itertools.islice(itertools.combinations(range(bits), (bits + 1) // 2), count)
    codes = torch.zeros(count, bits, dtype=torch.bool)
    return codes.scatter(1, torch.tensor(list(chosen)).reshape(count, -1), True)


def find_rows(codes: Sequence[Tensor], changes: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The rows that numbers depend on, found from the evaluations in which the numbers changed.

    Args:
        codes: ``[R, L]`` which rows were changed in each evaluation, one tensor for each series of evaluations.
        changes: ``[L, E]`` whether each number changed, for each series.

    Returns:
        ``[E]`` a row that each number depends on, -1 for none; and sets of rows, each tied by a number that depends on
        several of them. A set may hold more rows than the number depends on.
    """
    keys, patterns = _keys(codes[0]), _keys(changes[0].T)
    order = keys.argsort()
    row = order[torch.searchsorted(keys[order], patterns).clamp(max=len(order) - 1)]
    single = keys[row] == patterns
    rows = torch.where(single, row, -1)
    several = ~single & torch.stack([change.any(0) for change in changes]).any(0)
    sets, groups = [], _alike(torch.cat(list(changes)).T, several)
    if len(groups) > _MOST_SETS:
        rows[several] = 0
        return rows, [torch.arange(len(keys))]
    for elements in groups:
        seen = [change[:, elements[0]] for change in changes]
        covered = torch.stack([~(code & ~bits).any(1) for code, bits in zip(codes, seen, strict=True)]).all(0)
        # Where changes of several rows cancel, a number may change in fewer evaluations than a code: then it may be any row.
        whole = int(seen[0].sum()) > int(codes[0][0].sum()) and bool(covered.any())
        found = covered.nonzero().flatten() if whole else torch.arange(len(keys))
        rows[elements] = found[0]
        sets.append(found)
    return rows, sets


def _keys(bits: Tensor) -> Tensor:
    """``[R]`` the bits of each row as one whole number."""
    return (bits.long() << torch.arange(bits.shape[1])).sum(1)


def _alike(patterns: Tensor, chosen: Tensor) -> Sequence[Tensor]:
    """The chosen elements of ``[E, L]`` patterns, grouped by their pattern."""
    elements = chosen.nonzero().flatten()
    _, which = patterns[elements].unique(dim=0, return_inverse=True)
    counts = which.bincount().tolist()
    return elements[which.argsort(stable=True)].split(counts) if counts else ()
