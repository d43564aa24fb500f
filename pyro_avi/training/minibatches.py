"""Minibatches of tensors that stand in memory, or in files that are mapped into it."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_avi.distributed.ranks import Ranks
from pyro_avi.errors import check_count
from pyro_avi.seeds import as_seed
from pyro_avi.training.read_ahead import ReadAhead

__all__ = ["minibatches"]


def minibatches(
    *tensors: Any, batch_size: int, distributed: Any = False, seed: int | None = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Endless minibatches ``(x[index], ..., index)``, a fresh permutation every epoch.

    The last batch of an epoch may be smaller. The seed alone decides the order.

    Args:
        tensors: each ``[N, ...]``; also NumPy arrays and data frames, whose floating-point numbers get torch's default type.
            Arrays on disk, as ``np.load(path, mmap_mode="r")`` gives them, stay there: the rows of a batch are read, and those
            of the next one while a step is taken.
        batch_size: ``B``, of all processes together.
        distributed: as for :func:`~pyro_avi.fit`: with ``True`` process ``k`` of ``K`` gets its share of every batch, from its
            own rows ``k, k + K, ...``. The tensors are the same in all processes, and ``index`` are positions in them.
            An epoch has as many steps as in one process, and its batches differ by at most one row.
        seed: the seed of the permutations; ``None`` for one drawn from the random state of the program.

    Raises:
        TypeError: if one of them is not an array of numbers.
        ValueError: if there is no tensor, the tensors differ in their number of rows, or the batch size is not positive; or if
            a process would get an empty batch.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> batches = avi.minibatches(torch.arange(10.0), batch_size=4)
        >>> [len(index) for x, index in (next(batches) for _ in range(4))]
        [4, 4, 2, 4]
    """
    ahead, found = ReadAhead(tensors), list(map(_tensor, tensors))
    tensors, dtypes = tuple(tensor for tensor, _ in found), tuple(dtype for _, dtype in found)
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"Expected tensors with one and the same number of rows, at least 1, got {sorted(sizes)}.")
    check_count("batch_size", batch_size)
    ranks = Ranks(distributed)
    size, shard = len(tensors[0]), ranks.shard
    rows = None if shard is None else shard.rows(size)
    if shard is not None and size // shard.count < -(-size // batch_size):
        raise ValueError(
            f"Expected batch_size of at least the number of processes, {shard.count}, and a row for each of them in every "
            f"batch, got {batch_size} of {size} rows.\nPass a larger batch_size=, or start fewer processes."
        )
    return _Minibatches(tensors, dtypes, rows, batch_size, cast(int, ranks.seed(as_seed(seed))), ahead)


def _tensor(given: Any) -> tuple[Tensor, torch.dtype]:
    """An array as a tensor, with the type that its batches have."""
    if isinstance(given, Tensor):
        return given, given.dtype
    array = np.asarray(given)
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise TypeError(
            f"Expected tensors or arrays of numbers with a row for each observation, got a {type(given).__name__} of "
            f"{array.dtype} and {array.ndim} dimensions.\nPass categories as whole numbers, for example by pandas.factorize."
        )
    with warnings.catch_warnings():
        # Of arrays that cannot be written; a batch is a copy of its rows.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.as_tensor(array)
    dtype = torch.get_default_dtype() if tensor.is_floating_point() else tensor.dtype
    return tensor if isinstance(given, np.memmap) else tensor.to(dtype), dtype


class _Minibatches(Iterator[tuple[Tensor, ...]]):
    """Endless minibatches of all rows or of some; a few can be passed over at the cost of their permutations alone."""

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        dtypes: tuple[torch.dtype, ...],
        rows: Tensor | None,
        batch_size: int,
        seed: int,
        ahead: ReadAhead,
    ):
        self._tensors, self._dtypes, self._rows, self._batch_size = tensors, dtypes, rows, batch_size
        self._ahead = ahead
        self._generator = torch.Generator().manual_seed(seed)
        # Of this epoch, by batch, and how many were taken.
        self._indices: tuple[Tensor, ...] = ()
        self._taken = 0

    def __next__(self) -> tuple[Tensor, ...]:
        if self._taken == len(self._indices):
            self._shuffle()
        index = self._indices[self._taken]
        self._taken += 1
        for following in self._indices[self._taken : self._taken + 1]:
            self._ahead(following)
        # Faster than tensor[index], the same rows.
        rows = (
            tensor.index_select(0, index).to(dtype) for tensor, dtype in zip(self._tensors, self._dtypes, strict=True)
        )
        return (*rows, index)

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        while count > 0:
            if self._taken == len(self._indices):
                self._shuffle()
            passed = min(count, len(self._indices) - self._taken)
            self._taken += passed
            count -= passed

    def _shuffle(self) -> None:
        size, device = len(self._tensors[0]), self._tensors[0].device
        count = size if self._rows is None else len(self._rows)
        order = torch.randperm(count, generator=self._generator, device="cpu")
        if self._rows is not None:
            order = self._rows[order]
        if device.type == "cuda":
            # The program does not wait for a copy from pinned memory.
            order = order.pin_memory()
        order = order.to(device, non_blocking=True)
        if self._rows is None:
            self._indices, self._taken = order.split(self._batch_size), 0
        else:
            # In step with the shares of other processes, whose numbers of rows may differ by one.
            self._indices, self._taken = order.tensor_split(-(-size // self._batch_size)), 0
        self._ahead(self._indices[0])
