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
from pyro_avi.rows.shard import Shard
from pyro_avi.seeds import as_seed
from pyro_avi.training.read_ahead import RowReader

__all__ = ["minibatches"]


def minibatches(
    *tensors: Any, batch_size: int, last_batch: str = "rollover", distributed: Any = False, seed: int | None = 0
) -> Iterator[tuple[Tensor, ...]]:
    """Endless minibatches ``(x[index], ..., index)``, a fresh permutation every epoch.

    All have ``batch_size`` rows, no row twice: those that are left at the end of an epoch are joined by the first rows of the
    next one that are not among them. So every row is in one batch of each epoch, and each batch is a uniformly random set of
    rows, whose gradient is unbiased by ``N / B``. The seed alone decides the order.

    Args:
        tensors: each ``[N, ...]``; also NumPy arrays and data frames, whose floating-point numbers get torch's default type.
            Arrays on disk, as ``np.load(path, mmap_mode="r")`` gives them, stay there. Of large ones, beyond a tenth of the
            machine's memory, threads read the rows of the next batches while a step is taken: up to 32 of them, or as many
            as 64 MB hold; what is written to such an array is seen that much later.
        batch_size: ``B``, of all processes together. One that is larger than ``N`` gives batches of all rows.
        last_batch: ``"rollover"``, or ``"keep"`` to have every epoch end with a smaller batch of the rows that are left, as
            torch's loaders do without ``drop_last``: an epoch is ``N / B`` steps, rounded up. Its last step has the variance of
            a small batch, and the graph of another shape where steps are compiled.
        distributed: as for :func:`~pyro_avi.fit`: with ``True`` process ``k`` of ``K`` gets its share of every batch, from its
            own rows ``k, k + K, ...``, which are in one batch of each of its epochs. The tensors are the same in all processes,
            and ``index`` are positions in them. Shares differ by at most one row; they are equal where ``K`` divides ``N`` and
            ``B``, and elsewhere a row is in as many batches as any other in the long run. With ``last_batch="keep"`` an epoch
            has as many steps as in one process.
        seed: the seed of the permutations; ``None`` for one drawn from the random state of the program.

    Raises:
        TypeError: if one of them is not an array of numbers.
        ValueError: if there is no tensor, the tensors differ in their number of rows, the batch size is not positive,
            ``last_batch`` is another word, or a process would get an empty batch.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> batches = avi.minibatches(torch.arange(10.0), batch_size=4)
        >>> [len(index.unique()) for x, index in (next(batches) for _ in range(4))]
        [4, 4, 4, 4]
        >>> batches = avi.minibatches(torch.arange(10.0), batch_size=4, last_batch="keep")
        >>> [len(index) for x, index in (next(batches) for _ in range(4))]
        [4, 4, 2, 4]
    """
    arrays, found = tensors, list(map(_tensor, tensors))
    tensors, dtypes = tuple(tensor for tensor, _ in found), tuple(dtype for _, dtype in found)
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"Expected tensors with one and the same number of rows, at least 1, got {sorted(sizes)}.")
    check_count("batch_size", batch_size)
    if last_batch not in ("rollover", "keep"):
        raise ValueError(f"Expected last_batch to be 'rollover' or 'keep', got {last_batch!r}.")
    ranks = Ranks(distributed)
    positions = _Positions(
        len(tensors[0]),
        batch_size,
        ranks.shard,
        keeps_last=last_batch == "keep",
        device=tensors[0].device,
        seed=cast(int, ranks.seed(as_seed(seed))),
    )
    return _Minibatches(RowReader(arrays, tensors, dtypes, batch_size), positions)


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
    """Endless minibatches of the rows at some positions; a few can be passed over at the cost of their permutations alone."""

    def __init__(self, reader: RowReader, positions: "_Positions"):
        self._reader, self._positions = reader, positions
        # Batches whose rows are being read, and what returns these.
        self._coming: deque[tuple[Tensor, Callable[[], tuple[Tensor, ...]]]] = deque()

    def __next__(self) -> tuple[Tensor, ...]:
        # Not one at every step, as waking a thread takes longer than to give it more to do.
        if len(self._coming) <= self._reader.ahead // 2:
            for _ in range(1 + self._reader.ahead - len(self._coming)):
                index = next(self._positions)
                self._coming.append((index, self._reader.begin(index)))
        index, rows = self._coming.popleft()
        return (*rows(), index)

    @property
    def batch_size(self) -> int:
        """The number of rows in a batch, but for smaller ones at the ends of epochs."""
        return self._positions.batch_size

    @property
    def rows(self) -> tuple[Tensor, ...] | None:
        """``[N, ...]`` each, of which a batch is a copy of some rows; ``None`` where rows are converted, or read from files."""
        return self._reader.in_memory()

    def positions_ahead(self, most: int) -> Tensor:
        """``[M, B]`` the positions of the next batches, which are passed over.

        Up to so many, and not beyond the first one that has another number of rows.
        """
        return self._positions.ahead(most)

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        while self._coming and count > 0:
            self._coming.popleft()
            count -= 1
        self._positions.skip(count)

    def __getstate__(self) -> dict[str, Any]:
        # Of what is being read, the copy reads its own.
        return {**self.__dict__, "_coming": [index for index, _ in self._coming]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._coming = deque((index, self._reader.begin(index)) for index in state["_coming"])


class _Positions(Iterator[Tensor]):
    """The positions ``[B]`` of the rows of batches without end: permutations one after another, cut into batches.

    Where a cut does not fall on the end of a permutation, the rows left of it and the first others of the next one are a batch.
    A permutation is as likely as the same one with the rows renamed, so that a batch is as likely as any other of its size.

    Args:
        size: ``N``, the number of rows.
        batch_size: ``B``, of all processes together.
        shard: the rows of this process, ``None`` for all.
        keeps_last: whether cuts fall on the end of every permutation.
        device: of the positions.
        seed: of the permutations.

    Raises:
        ValueError: if a process would get an empty batch.
    """

    def __init__(
        self, size: int, batch_size: int, shard: Shard | None, *, keeps_last: bool, device: torch.device, seed: int
    ):
        self._size, self._batch_size, self._shard = size, min(batch_size, size), shard
        self._rows = None if shard is None else shard.rows(size)
        self._count = size if self._rows is None else len(self._rows)
        if shard is not None and size // shard.count < -(-size // batch_size):
            raise ValueError(
                f"Expected batch_size of at least the number of processes, {shard.count}, and a row for each of them in every "
                f"batch, got {batch_size} of {size} rows.\nPass a larger batch_size=, or start fewer processes."
            )
        self._keeps_last, self._device = keeps_last, device
        self._generator = torch.Generator().manual_seed(seed)
        # Of this permutation, how many rows of it and how many batches in all were taken.
        self._order, self._at, self._taken = torch.empty(0, dtype=torch.int64), 0, 0
        # The rows of the largest batch.
        self._most = -(-self._batch_size * self._count // size)

    def __next__(self) -> Tensor:
        count = self._rows_before(self._taken + 1) - self._rows_before(self._taken)
        begin, end = self._at, self._at + count
        self._taken += 1
        if end <= len(self._order):
            self._at = end
            return self._order[begin:end]
        left, self._order = self._order[begin:], self._permutation()
        self._at = count - len(left)
        if not len(left):
            return self._order[:count]
        # At most as many of the first rows are in the batch already as were left. They come right after it.
        first = self._order[:count]
        is_left = torch.zeros(self._size, dtype=torch.bool, device=self._device).index_fill_(0, left, True)
        self._order[:count] = first[is_left[first].argsort(stable=True)]
        return torch.cat([left, self._order[: self._at]])

    @property
    def batch_size(self) -> int:
        """The number of rows in a batch of this process, but for smaller ones at the ends of epochs."""
        return self._most

    def ahead(self, most: int) -> Tensor:
        """``[M, B]`` the next positions, up to so many times, and not beyond a batch of another size."""
        size, parts = self._batch_size, []
        while most > 0 and self._shard is None:
            whole = min(most, (len(self._order) - self._at) // size)
            if whole:
                begin, self._at = self._at, self._at + whole * size
                self._taken += whole
                parts.append(self._order[begin : self._at].view(whole, size))
            elif self._at == len(self._order):
                self._order, self._at = self._permutation(), 0
                continue
            elif self._keeps_last:
                break
            else:
                whole = 1
                parts.append(next(self).view(1, size))
            most -= whole
        return torch.cat(parts) if parts else torch.empty(0, size, dtype=torch.int64)

    def skip(self, count: int) -> None:
        """Pass over so many batches."""
        end = self._taken + count
        while self._taken < end:
            # Those that lie in this permutation at once.
            after = min(end, self._taken + (len(self._order) - self._at) // self._most)
            self._at += self._rows_before(after) - self._rows_before(self._taken)
            self._taken = after
            if self._taken < end:
                next(self)

    def _rows_before(self, batch: int) -> int:
        """The number of rows in the batches before this one."""
        if not self._keeps_last:
            count = batch * self._batch_size
            return count if self._shard is None else self._shard.share(count, self._size)
        steps = -(-self._size // self._batch_size)
        epochs, batch = divmod(batch, steps)
        if self._shard is None:
            return epochs * self._count + min(batch * self._batch_size, self._count)
        # In step with the shares of other processes, whose numbers of rows may differ by one.
        each, larger = divmod(self._count, steps)
        return epochs * self._count + batch * each + min(batch, larger)

    def _permutation(self) -> Tensor:
        order = torch.randperm(self._count, generator=self._generator, device="cpu")
        if self._rows is not None:
            order = self._rows[order]
        if self._device.type == "cuda":
            # The program does not wait for a copy from pinned memory.
            order = order.pin_memory()
        return order.to(self._device, non_blocking=True)
