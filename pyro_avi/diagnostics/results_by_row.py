"""What a function says of every row, batch by batch, in arrays on disk."""

from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_avi.display.progress_bar import progress_bar
from pyro_avi.errors import check_count
from pyro_avi.tensor_files import reserve

__all__ = ["results_by_row"]

_DONE = "rows_done"


def results_by_row(
    function: Callable[..., Mapping[str, Tensor]],
    batches: Iterable[tuple],
    *,
    size: int,
    out: str | PathLike,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Apply a function to batches of rows, and keep what it says of every row in arrays on disk.

    So posteriors, gaps (:func:`~pyro_avi.measure_gaps`) and refined parameters (:func:`~pyro_avi.refine`) are had of more rows
    than memory holds: no more of them is in memory than of one batch. Work that was interrupted goes on: batches whose rows are
    all in the folder are passed over.

    Args:
        function: takes the arguments of a batch, its positions among them, and returns by name ``[B, ...]`` of its rows.
        batches: tuples whose last part are the positions ``[B]`` of their rows, for example :func:`~pyro_avi.minibatches`.
            They are used until every row has been in one; a row that is in several has the results of the first.
        size: ``N``, the number of rows.
        out: the folder of the arrays, ``NAME.npy`` for each name, made where there is none. Another function, or other
            data, need another folder.
        progress: whether to show a progress bar, which appears after the first second.

    Returns:
        By name ``[N, ...]``, mapped from the files, to be read.

    Raises:
        ValueError: if batches end before every row was in one, results are not of the rows of the batch or not what the
            folder holds, a name is no plain word, or the folder cannot be written.

    Example::

        >>> import tempfile, torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model).setup(x)
        >>> def measure(x, index):
        ...     gaps = avi.measure_gaps(model, guide, x, num_samples=26, num_steps=2, max_rounds=1)
        ...     return {"amortization": gaps.amortization.rows, "mean": guide.posterior(x).mean}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = avi.results_by_row(measure, avi.minibatches(x, batch_size=8), size=20, out=folder)
        ...     shapes = {name: rows.shape for name, rows in found.items()}
        >>> shapes
        {'amortization': (20,), 'mean': (20, 2)}
    """
    check_count("size", size)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        done = _array(folder, _DONE, (size,), np.dtype(bool))
        arrays: dict[str, np.ndarray] = {}
        with progress_bar(size, initial=int(done.sum()), unit="row", progress=progress) as bar:
            for batch in batches if not done.all() else ():
                index = _positions(batch, size)
                new = ~done[index]
                if new.any():
                    _write(arrays, folder, index, new, size, function(*batch))
                    bar.update(len(np.unique(index[new])))
                    # Last, so that what is said to be done is.
                    done[index] = True
                if done.all():
                    break
    except OSError as error:
        raise ValueError(f"Expected a folder with room for the results at {folder}, got: {error.strerror}.") from error
    if not done.all():
        raise ValueError(
            f"Expected batches with all {size:,} rows, got none with {int((~done).sum()):,} of them.\nPass what goes over all "
            "rows, as avi.minibatches(...); what was found is kept."
        )
    files = sorted(file for file in folder.glob("*.npy") if file.stem != _DONE)
    return {file.stem: np.load(file, mmap_mode="r") for file in files}


def _positions(batch: tuple, size: int) -> np.ndarray:
    index = batch[-1] if isinstance(batch, tuple | list) and batch else None
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            "Expected batches whose last part are the positions [B] of their rows, whole numbers, got "
            f"{type(index).__name__ if not isinstance(index, Tensor) else (index.dtype, tuple(index.shape))}."
        )
    found = index.cpu().numpy()
    if len(found) and not (found.min() >= 0 and found.max() < size):
        raise ValueError(f"Expected positions from 0 to {size - 1}, got {found.min()} to {found.max()}.")
    return found


def _write(
    arrays: dict[str, np.ndarray],
    folder: Path,
    index: np.ndarray,
    new: np.ndarray,
    size: int,
    found: Mapping[str, Any],
) -> None:
    """Write the results of the new rows of a batch: others are done, and are not left half written."""
    if arrays and arrays.keys() != found.keys():
        raise ValueError(f"Expected the results {sorted(arrays)} of every batch, got {sorted(found)}.")
    for name, tensor in found.items():
        rows = tensor.detach().cpu().numpy()
        if rows.ndim == 0 or len(rows) != len(index):
            raise ValueError(f"Expected {name!r} of the {len(index)} rows of the batch, got the shape {rows.shape}.")
        if name not in arrays:
            arrays[name] = _array(folder, name, (size, *rows.shape[1:]), rows.dtype)
        if arrays[name].shape[1:] != rows.shape[1:] or arrays[name].dtype != rows.dtype:
            raise ValueError(f"Expected {name!r} as {_kind(arrays[name])}, like other batches, got {_kind(rows)}.")
        arrays[name][index[new]] = rows[new]


def _array(folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The array of a name, of zeros where there is none yet."""
    if not name.isidentifier():
        raise ValueError(f"Expected names of results that are plain words, got {name!r}.")
    path = folder / f"{name}.npy"
    if not path.exists():
        part = folder / f"{name}.part"
        np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
        with open(part, "r+b") as file:
            reserve(file.fileno(), 0, part.stat().st_size)
        part.replace(path)
    array = np.lib.format.open_memmap(path, mode="r+")
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"Expected results of shape {shape} and type {dtype} at {path}, got {array.shape} and {array.dtype}: they are of "
            "another function or other data.\nPass another folder: out=..."
        )
    return array


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} of shape [B{''.join(f', {n}' for n in array.shape[1:])}]"
