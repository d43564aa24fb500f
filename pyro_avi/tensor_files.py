"""Tensors in files as safetensors, all else as JSON in their header, so that reading runs no code of a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, key: str) -> None:
    """Write a file, replaced where it exists, at once or not at all.

    Args:
        path: the file.
        tensors: by name.
        header: plain data.
        key: what the header stands under.
    """
    part = path.with_name(path.name + ".part")
    # Parameters may share memory or be views, which the format does not know.
    whole = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(whole, part, metadata={key: json.dumps(header)})
    part.replace(path)


def read_tensors(path: Path, *, key: str, writer: str) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The header, ``None`` where there is none under the key, and the tensors by name.

    Args:
        path: the file.
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
            text = (file.metadata() or {}).get(key)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        return None if text is None else json.loads(text), tensors
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"Expected a whole file written by {writer} at {path}, got a damaged one: {error}.") from error
