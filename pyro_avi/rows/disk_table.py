"""The parameters of all rows in a file, those of a row beside the state of its optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.rows.mapped_file import MappedFile
from pyro_avi.rows.table import Table
from pyro_avi.tensor_files import read_tensors, write_tensors

__all__ = ["DiskTable"]

# 1 had values and states in two files.
_FORMAT, _KEY = 2, "pyro_avi_rows"
# Rows that are visited at a time where all are.
_CHUNK = 2**16
# The mark of rows that hold their values, and no state of a training.
_NO_TRAINING = -1


class DiskTable(Table):
    """Parameters ``[N, P]`` of all rows in a file that is mapped into memory.

    A row of the file is ``[values P | first moment P | second moment P | visits | mark]``, so that a step touches one place of
    the disk for each row of its batch. The mark is the number of the training that moved the row last, and 0 in a file that is
    new: such a row has the initial values without having been written, and moments of earlier trainings count as zeros.
    The initial values and what the rows are stand in a second file, which is written last, when the table is whole.

    Args:
        initial: ``[B, P]`` the first values of some rows, on the device of the model.
        sizes: the number of rows of each plate.
        path: the files without their suffixes. A table that is there already goes on as it is.
        kind: what the rows are, as plain data; a table of another kind is refused.

    Raises:
        ValueError: if there is another table, a damaged one or one in use, or it cannot be written.
    """

    def __init__(self, initial: Tensor, sizes: tuple[int, ...], path: Path, kind: Mapping[str, Any]):
        # Without the memory that the table of the base class takes.
        super(Table, self).__init__()
        self.sizes, self.stays = sizes, True
        # A buffer, which moves with the model, records the device of the model.
        self.register_buffer("place", initial.new_empty(0), persistent=False)
        initial = initial.detach().cpu()
        self._about, self._size = path.with_name(f"{path.name}.safetensors"), torch.Size(sizes).numel()
        numbers = {"num_parameters": initial.shape[1], "dtype": str(initial.dtype).removeprefix("torch.")}
        self._kind = {"format": _FORMAT, **kind, **numbers}
        exists = self._about.exists()
        if exists:
            initial = self._read_about()
        self._initial = initial
        width, dtype = 3 * initial.shape[1] + 2, initial.dtype
        self._file = MappedFile(path.with_name(f"{path.name}.rows"), self._size, width, dtype, create=not exists)
        if not exists:
            self.flush()
            self._write_about()
        self._set_views()

    def _write_about(self) -> None:
        write_tensors(self._about, {"initial": self._initial}, {**self._kind, "sizes": list(self.sizes)}, key=_KEY)

    def _read_about(self) -> Tensor:
        header, tensors = read_tensors(self._about, key=_KEY, writer="a guide with rows_on='disk'")
        expected = {**self._kind, "sizes": list(self.sizes)}
        for part in expected:
            if header is None or header.get(part) != expected[part]:
                found = None if header is None else header.get(part)
                raise ValueError(
                    f"Expected a table with {part} = {expected[part]} at {self._about}, got {found}.\n"
                    "Try one of the following fixes:\n"
                    "- the model, data and options that the table was made with\n"
                    "- another folder for a new table: rows_path=..."
                )
        return tensors["initial"]

    def _set_views(self) -> None:
        self.table = _Values(self._file.rows[:, : self._initial.shape[1]])
        self._marks = self._file.rows[:, -1:]

    # What the numbers at the head of the file are: trainings begun, moves, whether the values of all rows have been written.
    @property
    def _values(self) -> Tensor:
        return self.table.detach()

    @property
    def _training(self) -> int:
        return int(self._file.head[0])

    @property
    def version(self) -> int:
        """How often rows were moved since the table was made."""
        return int(self._file.head[1])

    def read(self, index: Tensor | None) -> Tensor:
        """The rows ``[B, P]``, ``None`` for all in order, on the device of the model.

        Where gradients are recorded, initial values of these rows are written first.
        """
        if index is None:
            return self.whole().clone(memory_format=torch.contiguous_format).to(self.device)
        self._file.will_need(index)
        implied = not self._file.head[2]
        if implied and torch.is_grad_enabled():
            # Pyro's optimizers move the values that the file has.
            with torch.no_grad():
                self._write_first(index)
        rows = self.table.index_select(0, index)
        if implied:
            new = self._marks.index_select(0, index) == 0
            rows = torch.where(new, self._first_values(index), rows)
        return rows.to(self.device)

    def _write_first(self, index: Tensor) -> None:
        new = index[self._marks.index_select(0, index).flatten() == 0]
        self._values[new] = self._first_values(new)
        self._marks[new] = _NO_TRAINING

    def _first_values(self, index: Tensor) -> Tensor:
        return self._initial[index % len(self._initial)]

    @torch.no_grad()
    def read_to_move(self, index: Tensor | None) -> Tensor:
        """The rows, after what the files only imply of them is written: initial values, and moments of zero."""
        self._file.head[1] += 1
        if index is not None:
            self._file.will_need(index)
            self._prepare(index)
            return self.table.index_select(0, index).to(self.device)
        for start in range(0, self._size, _CHUNK):
            self._prepare(torch.arange(start, min(start + _CHUNK, self._size)))
        return self.table.clone(memory_format=torch.contiguous_format).to(self.device)

    def _prepare(self, index: Tensor) -> None:
        marks = self._marks.index_select(0, index).flatten()
        new = index[marks == 0]
        self._values[new] = self._first_values(new)
        old = index[marks != self._training]
        self._file.rows[old, self._initial.shape[1] :] = 0.0
        self._marks[old] = self._training or _NO_TRAINING

    @torch.no_grad()
    def whole(self) -> nn.Parameter:
        """The parameters of all rows; the first time, initial values are written to rows that were never moved."""
        for start in range(0, 0 if self._file.head[2] else self._size, _CHUNK):
            self._write_first(torch.arange(start, min(start + _CHUNK, self._size)))
        self._file.head[2] = 1
        return self.table

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """The memory of a new training's moments, zeros: first and second ``[N, P]``, and visits ``[N, 1]``."""
        self._file.head[0] += 1
        width = self._initial.shape[1]
        _, first, second, visits, _ = self._file.rows.split([width, width, width, 1, 1], 1)
        return first, second, visits

    @torch.no_grad()
    def append(self, start: Tensor) -> None:
        """Append rows.

        Args:
            start: ``[M, P]`` their parameters.

        Raises:
            ValueError: if the disk lacks the space; then nothing has changed.
        """
        old, size = self._size, self._size + len(start)
        self._file.resize(size)
        self._size, self.sizes = size, (size,)
        self._set_views()
        self._values[old:] = start
        self._marks[old:] = _NO_TRAINING
        self._file.head[1] += 1
        self.flush()
        self._write_about()

    def flush(self) -> None:
        """Write back all that changed; return when the disk has it."""
        self._file.flush()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # The rows are in a file of their own.
        pass

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        key = f"{prefix}table"
        if key not in state_dict:
            return
        if state_dict[key].shape != self.table.shape:
            errors.append(f"size mismatch for {key}: {tuple(state_dict[key].shape)}, {tuple(self.table.shape)}.")
            return
        with torch.no_grad():
            self.whole().copy_(state_dict[key])
        self._file.head[1] += 1

    def _apply(self, fn, recurse=True):
        single = fn(self._initial.new_empty(0)).dtype
        if single != self._initial.dtype:
            raise ValueError(
                f"Expected {self._initial.dtype}, in which the table at {self._about} is kept, got {single}.\n"
                "Make the guide after the default dtype, or that of the model and its data, is chosen."
            )
        # Of the parameters and buffers none but the place moves.
        self._buffers["place"] = fn(self.place)
        return self

    def __getstate__(self):
        raise TypeError(
            "Expected a guide whose table is in memory, to be copied or pickled, got one with rows_on='disk': two guides "
            "cannot have one table.\nTry one of the following fixes:\n"
            "- avi.save and avi.load, which leave the table where it is\n"
            "- a copy of the folder rows_path, and a guide with that"
        )


class _Values(nn.Parameter):
    """The first columns of the rows of a file."""

    def contiguous(self, *args, **kwargs):
        # Pyro's store would train a copy, which no file knows of.
        return self
