"""The parts that an encoder's input is made of: values by row, each with a mask where it has one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData
from pyro_avi.inspection.structure import RowSet

__all__ = ["Part", "check_finite", "join_parts", "join_with_gaps", "read_observed"]

# A value ``[*B, ...]`` and true where it is known; ``None`` for a value without a mask.
Part = tuple[Tensor, Tensor | None]


def read_observed(name: str, data: CallData, rows: RowSet, dtype: torch.dtype, *, masked: bool) -> Part:
    """The observed value of a site, its rows in front, and its mask where it has one.

    Args:
        name: of the site.
        data: of the call.
        rows: the set of rows.
        dtype: of the encoder.
        masked: whether the site was masked in the first call, so that the encoder reads a mask.

    Raises:
        ValueError: if the site has a mask and had none in the first call, or its rows are in other dimensions.
    """
    value, mask, dims = data.values[name].to(dtype), data.masks.get(name), rows.observations[name]
    if mask is not None and not masked:
        raise ValueError(
            f"Expected site {name!r} without a mask, as in the first call, got a mask.\n"
            "Call guide.setup(*args) with arguments for which it is masked: the encoder reads the mask too."
        )
    if not masked:
        return _rows_first(value, dims), None
    known = True if mask is None else mask.of_elements(rows.frames[0].dim - dims[0])
    known = torch.as_tensor(known, device=value.device).expand_as(value)
    return _rows_first(value, dims), _rows_first(known, dims)


def check_finite(name: str, part: Part, depth: int) -> None:
    """Raise an error for observed values that would make every parameter nan.

    Args:
        name: of the site.
        part: its value and mask.
        depth: the number of plates of the rows.

    Raises:
        ValueError: if a value that is not masked is nan or infinite.
    """
    value, known = part
    bad = ~value.isfinite() if known is None else ~value.isfinite() & known
    bad = bad.flatten(0, depth - 1)
    if bad.any():
        count = int(bad.reshape(len(bad), -1).any(-1).sum())
        raise ValueError(
            f"Expected finite values at observed site {name!r}, got {count} of {len(bad)} rows with values that are "
            "nan or infinite.\nTry one of the following fixes:\n"
            "- mask what is missing, and put a number in its place: "
            f"pyro.sample({name!r}, fn.mask(~x.isnan()), obs=x.nan_to_num())\n"
            "- leave these rows out"
        )


def join_parts(parts: Sequence[Part], standardize: nn.ModuleList, depth: int) -> Tensor:
    """The inputs of an encoder; several parts are flattened behind their ``depth`` dimensions of rows.

    Args:
        parts: ``[*B, ...]`` each.
        standardize: what standardizes each of them; empty where nothing does.
        depth: the number of plates of the rows.
    """
    inputs = []
    for position, (value, known) in enumerate(parts):
        if standardize:
            value = standardize[position](value, known)
        elif known is not None:
            value = torch.where(known, value, 0.0)
        inputs += [value] if known is None else [value, known.to(value.dtype)]
    if len(inputs) == 1:
        return inputs[0]
    return torch.cat([part.flatten(depth) if part.dim() > depth else part[..., None] for part in inputs], -1)


def join_with_gaps(parts: Sequence[Part], standardize: nn.ModuleList, depth: int, *, by_row: bool) -> Tensor:
    """The inputs of an encoder that knows gaps, with ``nan`` for what is not known.

    Args:
        parts: ``[*B, ...]`` each.
        standardize: what standardizes each of them; empty where nothing does.
        depth: the number of plates of the rows.
        by_row: whether all values of a row are one vector ``[*B, F]``; otherwise a row has observations ``[*B, M, F]``.

    Raises:
        ValueError: if several parts have other numbers of observations a row.
    """
    inputs = []
    for position, (value, known) in enumerate(parts):
        value = standardize[position](value, known) if standardize else value
        value = value if known is None else torch.where(known, value, torch.nan)
        if by_row:
            value = value.flatten(depth) if value.dim() > depth else value.unsqueeze(-1)
        else:
            value = value.unsqueeze(-1) if value.dim() == depth + 1 else value
        inputs.append(value)
    if len({value.shape[:-1] for value in inputs}) > 1 or inputs[0].dim() == depth:
        raise ValueError(
            f"Expected parts with the same number of observations a row, [B, M] or [B, M, F], got shapes "
            f"{[tuple(value.shape) for value in inputs]}.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
        )
    return torch.cat(inputs, -1)


def _rows_first(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The value with the dimensions of its rows in front."""
    there = all(value.dim() + dim == position for position, dim in enumerate(dims))
    try:
        return value if there else value.movedim(dims, tuple(range(len(dims))))
    except IndexError:
        raise ValueError(
            f"Expected observed values with their rows in dimension {dims[0]}, as the guide was set up with, got shape "
            f"{tuple(value.shape)}."
        ) from None
