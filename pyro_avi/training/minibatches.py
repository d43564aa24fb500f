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
    return _Minibatches(tensors, batch_size, as_seed(seed))


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


class _Minibatches(Iterator[tuple[Tensor, ...]]):
    """Endless minibatches; some can be passed over at the cost of their permutations alone."""

    def __init__(self, tensors: tuple[Tensor, ...], batch_size: int, seed: int):
        self._tensors, self._batch_size = tensors, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        # Of this epoch, by batch, and how many were taken.
        self._indices: tuple[Tensor, ...] = ()
        self._taken = 0

    def __next__(self) -> tuple[Tensor, ...]:
        if self._taken == len(self._indices):
            self._shuffle()
        index = self._indices[self._taken]
        self._taken += 1
        # Faster than tensor[index], the same rows.
        return (*(tensor.index_select(0, index) for tensor in self._tensors), index)

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        while count > 0:
            if self._taken == len(self._indices):
                self._shuffle()
            passed = min(count, len(self._indices) - self._taken)
            self._taken += passed
            count -= passed

    def _shuffle(self) -> None:
        order = torch.randperm(len(self._tensors[0]), generator=self._generator, device="cpu")
        device = self._tensors[0].device
        if device.type == "cuda":
            # The program does not wait for a copy from pinned memory.
            order = order.pin_memory()
        self._indices, self._taken = order.to(device, non_blocking=True).split(self._batch_size), 0
