"""Minibatches of tensors that stand in memory, or in files that are mapped into it."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pyro_avi.distributed.ranks import Ranks
from pyro_avi.errors import check_count
from pyro_avi.seeds import as_seed
from pyro_avi.training.read_ahead import RowReader

__all__ = ["minibatches"]


def minibatches(
    *tensors: Any, batch_size: int, distributed: Any = False, seed: int | None = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Endless minibatches ``(x[index], ..., index)``, a fresh permutation every epoch.

    The last batch of an epoch may be smaller. The seed alone decides the order.

    Args:
        tensors: each ``[N, ...]``; also NumPy arrays and data frames, whose floating-point numbers get torch's default type.
            Arrays on disk, as ``np.load(path, mmap_mode="r")`` gives them, stay there. Of large ones, beyond a tenth of the
            machine's memory, threads read the rows of the next batches while a step is taken: up to 32 of them, or as many
            as 64 MB hold; what is written to such an array is seen that much later.
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
    arrays, found = tensors, list(map(_tensor, tensors))
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
    reader = RowReader(arrays, tensors, dtypes, batch_size)
    return _Minibatches(reader, size, tensors[0].device, rows, batch_size, cast(int, ranks.seed(as_seed(seed))))


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
        reader: RowReader,
        size: int,
        device: torch.device,
        rows: Tensor | None,
        batch_size: int,
        seed: int,
    ):
        self._reader, self._size, self._device = reader, size, device
        self._rows, self._batch_size = rows, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        # Of this epoch, by batch, and how many were begun.
        self._indices: tuple[Tensor, ...] = ()
        self._begun = 0
        # Batches whose rows are being read, and what returns these.
        self._coming: deque[tuple[Tensor, Callable[[], tuple[Tensor, ...]]]] = deque()

    def __next__(self) -> tuple[Tensor, ...]:
        # Not one at every step, as waking a thread takes longer than to give it more to do.
        if len(self._coming) <= self._reader.ahead // 2:
            self._begin(1 + self._reader.ahead - len(self._coming))
        index, rows = self._coming.popleft()
        return (*rows(), index)

    def _begin(self, count: int) -> None:
        for _ in range(count):
            if self._begun == len(self._indices):
                self._shuffle()
            index = self._indices[self._begun]
            self._begun += 1
            self._coming.append((index, self._reader.begin(index)))

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        while self._coming and count > 0:
            self._coming.popleft()
            count -= 1
        while count > 0:
            if self._begun == len(self._indices):
                self._shuffle()
            passed = min(count, len(self._indices) - self._begun)
            self._begun += passed
            count -= passed

    def _shuffle(self) -> None:
        count = self._size if self._rows is None else len(self._rows)
        order = torch.randperm(count, generator=self._generator, device="cpu")
        if self._rows is not None:
            order = self._rows[order]
        if self._device.type == "cuda":
            # The program does not wait for a copy from pinned memory.
            order = order.pin_memory()
        order = order.to(self._device, non_blocking=True)
        if self._rows is None:
            self._indices = order.split(self._batch_size)
        else:
            # In step with the shares of other processes, whose numbers of rows may differ by one.
            self._indices = order.tensor_split(-(-self._size // self._batch_size))
        self._begun = 0

    def __getstate__(self) -> dict[str, Any]:
        # Of what is being read, the copy reads its own.
        return {**self.__dict__, "_coming": [index for index, _ in self._coming]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._coming = deque((index, self._reader.begin(index)) for index in state["_coming"])
