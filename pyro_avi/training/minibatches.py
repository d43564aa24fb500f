"""Minibatches of tensors that stand in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_avi.errors import check_count
from pyro_avi.seeds import as_seed

__all__ = ["minibatches"]


def minibatches(*tensors: Any, batch_size: int, seed: int | None = 0) -> Iterator[tuple[Tensor, ...]]:
    """Endless minibatches ``(x[index], ..., index)``, a fresh permutation every epoch.

    The last batch of an epoch may be smaller. The seed alone decides the order.

    Args:
        tensors: each ``[N, ...]``; also NumPy arrays and data frames, whose floating-point numbers get torch's default type.
        batch_size: ``B``.
        seed: the seed of the permutations; ``None`` for one drawn from the random state of the program.

    Raises:
        TypeError: if one of them is not an array of numbers.
        ValueError: if there is no tensor, the tensors differ in their number of rows, or the batch size is not positive.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> batches = avi.minibatches(torch.arange(10.0), batch_size=4)
        >>> [len(index) for x, index in (next(batches) for _ in range(4))]
        [4, 4, 2, 4]
    """
    tensors = tuple(map(_tensor, tensors))
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"Expected tensors with one and the same number of rows, at least 1, got {sorted(sizes)}.")
    check_count("batch_size", batch_size)
    return _endless(tensors, batch_size, as_seed(seed))


def _tensor(given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given
    array = np.asarray(given)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise TypeError(
            f"Expected tensors or arrays of numbers with a row for each observation, got a {type(given).__name__} of "
            f"{array.dtype} and {array.ndim} dimensions.\nPass categories as whole numbers, for example by pandas.factorize."
        )
    tensor = torch.as_tensor(array.copy() if not array.flags.writeable else array)
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _endless(tensors, batch_size, seed):
    generator, device = torch.Generator().manual_seed(seed), tensors[0].device
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator, device="cpu")
        if device.type == "cuda":
            # The program does not wait for a copy from pinned memory.
            order = order.pin_memory()
        order = order.to(device, non_blocking=True)
        for index in order.split(batch_size):
            # Faster than tensor[index], the same rows.
            yield (*(tensor.index_select(0, index) for tensor in tensors), index)
