"""What processes compare before they train one model, and what they take over from the first of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_avi.distributed.ranks import Ranks

__all__ = ["start_alike"]


def start_alike(
    ranks: Ranks,
    guide: Callable,
    call: tuple,
    kwargs: Mapping[str, Any],
    *,
    description: Mapping[str, Any],
    shared: Sequence[Tensor],
) -> None:
    """Begin a training with the values of process 0 in all processes.

    Args:
        ranks: the processes.
        guide: any guide.
        call, kwargs: the arguments of the first step of this process.
        description: what must be the same in all processes, as plain data by what it describes.
        shared: the tensors that all processes share, overwritten by those of process 0.

    Raises:
        ValueError: if two processes describe different trainings or plates, or all have the same rows.
    """
    if ranks.alone:
        return
    rows_of = getattr(guide, "rows_of", None)
    rows = {} if rows_of is None else rows_of(*call, **kwargs)
    _check_same(ranks, {**description, "number of rows": {name: own.size for name, own in rows.items()}})
    _check_rows(ranks, {name: own.index.tolist() for name, own in rows.items() if own.index is not None})
    ranks.broadcast(shared)


def _check_same(ranks: Ranks, description: Mapping[str, Any]) -> None:
    others = ranks.gather(description)
    for what in description:
        for rank, other in enumerate(others):
            if other[what] != others[0][what]:
                raise ValueError(
                    f"Expected the same {what} in all {ranks.count} processes, got {others[0][what]} in process 0 and "
                    f"{other[what]} in process {rank}.\nGive all of them the same model, guide, options and data."
                )


def _check_rows(ranks: Ranks, rows: dict[str, list[int]]) -> None:
    """Refuse processes that have the same batch, by plate the positions of its rows."""
    if ranks.count == 1:
        return
    others = ranks.gather(rows)
    if rows and all(other == others[0] for other in others):
        raise ValueError(
            f"Expected a batch of its own for each of {ranks.count} processes, got the same {len(next(iter(rows.values())))} "
            "rows for all.\nTry one of the following fixes:\n"
            "- batches=avi.minibatches(x, batch_size=..., distributed=True)\n"
            "- DataLoader(..., sampler=torch.utils.data.DistributedSampler(dataset))"
        )
