"""Minibatches of tensors that stand in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["minibatches"]


def minibatches(*tensors: Tensor, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Endless minibatches ``(x[index], ..., index)``, a fresh permutation every epoch.

    The last batch of an epoch may be smaller. The order is decided by the seed alone.

    Args:
        tensors: each ``[N, ...]``.
        batch_size: ``B``.
        seed: of the permutations.

    Raises:
        ValueError: if there is no tensor, the tensors differ in their number of rows, or the batch size is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> batches = avi.minibatches(torch.arange(10.0), batch_size=4)
        >>> [len(index) for x, index in (next(batches) for _ in range(4))]
        [4, 4, 2, 4]
    """
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"Expected tensors with one and the same number of rows, at least 1, got {sorted(sizes)}.")
    if batch_size < 1:
        raise ValueError(f"Expected batch_size of at least 1, got {batch_size}.")
    return _endless(tensors, batch_size, seed)


def _endless(tensors, batch_size, seed):
    generator, device = torch.Generator().manual_seed(seed), tensors[0].device
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator, device="cpu")
        if device.type == "cuda":
            # From pinned memory nobody waits for the copy.
            order = order.pin_memory()
        order = order.to(device, non_blocking=True)
        for index in order.split(batch_size):
            # Faster than tensor[index], the same rows.
            yield (*(tensor.index_select(0, index) for tensor in tensors), index)
