"""Tensors in files as safetensors, all else as JSON in their header, so that reading runs no code of a file.

The header holds a SHA-256 of all of it, so that a file that was changed since it was written is told from a whole one.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_tensors", "reserve", "write_tensors"]

_CHECKSUM = "checksum"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, key: str) -> None:
    """Write a file, replaced where it exists, at once or not at all.

    Args:
        path: the file.
        tensors: by name.
        header: plain data.
        key: what the header stands under.

    Raises:
        OSError: if the disk does not take it. What was there before is untouched.
    """
    part = path.with_name(path.name + ".part")
    # Parameters may share memory or be views, which the format does not know. A plain clone keeps strides of an expanded one.
    whole = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    text = json.dumps(header)
    try:
        save_file(whole, part, metadata={key: text, _CHECKSUM: _checksum(text, whole)})
        # Before it has its name: what is there after a loss of power is whole.
        _see_on_disk(part)
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"Cannot write {path}: {error}.") from error
    finally:
        # On a disk that fails the write's own error is the one to show.
        with suppress(OSError):
            part.unlink(missing_ok=True)
    with suppress(OSError):
        _see_on_disk(path.parent)


def reserve(file: int, start: int, end: int) -> None:
    """Have the disk keep space for a file, where the system can: a full disk then says so here, not when the file is written.

    Args:
        file: its descriptor.
        start, end: of the bytes that are added, as positions in it.

    Raises:
        OSError: if there is no space.
    """
    # Not on macOS and Windows: there the file only gets its length.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, end - start)
    else:
        os.ftruncate(file, end)


def _see_on_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path, *, key: str, writer: str) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The header, ``None`` where there is none under the key, and the tensors by name.

    Memory is taken as the tensors are read: what the file declares, its length must hold.

    Args:
        path: the file. One that was written before there were checksums is read without.
        key: as for :func:`write_tensors`.
        writer: what writes such files, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file written by {writer}, found none at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return _header(metadata, tensors, key), tensors
    # Brackets in brackets end in a RecursionError.
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected a whole file written by {writer} at {path}, got a damaged one: {error}.") from error


def _header(metadata: dict[str, str], tensors: Mapping[str, Tensor], key: str) -> dict[str, Any] | None:
    """The header as it was written.

    Raises:
        ValueError: if header or tensors have changed since.
    """
    if key not in metadata:
        return None
    text = metadata[key]
    # By all names that stand there: the checksum under a damaged name is not a file without one.
    if set(metadata) != {key} and metadata.get(_CHECKSUM) != _checksum(text, tensors):
        raise ValueError("its checksum is another, it was changed since it was written")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError(f"its header is no dictionary but a {type(header).__name__}")
    return header


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the header's text, and of every tensor's name, kind and bytes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
