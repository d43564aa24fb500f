"""Trainings in files: tensors as safetensors, all else as JSON in the header; reading runs no code of the file."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_avi.tensor_files import read_tensors, write_tensors
from pyro_avi.training.training_state import TrainingState

__all__ = ["restore", "steps_in", "write"]

_FORMAT, _KEY = 1, "pyro_avi_training"


def write(path: str | PathLike, state: TrainingState, steps: int, losses: Tensor, random: list[Tensor]) -> None:
    """Write a training to a file, which is replaced whole or not at all.

    Args:
        path: the file.
        state: the state of the training.
        steps: the number of steps taken.
        losses: ``[steps]`` the loss of each.
        random: the random states of the CPU and of each CUDA device.
    """
    plain, optimizer_tensors = _flattened(state.optimizer_state())
    tensors = {f"value/{name}": value for name, value in state.values().items()}
    tensors |= {f"moment/{name}": value for name, value in state.moments().items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors.items()}
    tensors |= {f"random/{device}": value for device, value in enumerate(random)} | {"losses": losses}
    header = {"format": _FORMAT, "steps": steps, "optimizer": state.optimizer_class(), "optimizer_state": plain}
    write_tensors(Path(path), tensors, header, key=_KEY)


def steps_in(path: str | PathLike) -> int:
    """The number of steps of the training in a file."""
    return _read(Path(path))[0]["steps"]


def restore(path: str | PathLike, state: TrainingState) -> tuple[Tensor, list[Tensor]]:
    """Load the state in a file into a training.

    Args:
        path: the file.
        state: the state of a training of the same model and guide.

    Returns:
        The losses so far, and the random states.

    Raises:
        ValueError: if the file is of another model, guide or optimizer. Then nothing has changed.
    """
    header, tensors = _read(Path(path))
    parts: dict[str, dict[str, Tensor]] = {"value": {}, "moment": {}, "optimizer": {}, "random": {}}
    for name, tensor in tensors.items():
        kind, slash, rest = name.partition("/")
        if slash:
            parts[kind][rest] = tensor
    if header["optimizer"] != state.optimizer_class():
        raise ValueError(
            f"Expected the optimizer {header['optimizer']} of the training at {path}, got {state.optimizer_class()}.\n"
            "Pass the same optimizer= that it was begun with."
        )
    _check(path, "parameters and buffers", parts["value"], state.values())
    _check(path, "state of Adam", parts["moment"], state.moments())
    state.load(parts["value"], parts["moment"], _unflattened(header["optimizer_state"], parts["optimizer"]))
    return tensors["losses"], [parts["random"][name] for name in sorted(parts["random"], key=int)]


def _check(path, what: str, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]) -> None:
    kinds = [{name: (tuple(x.shape), x.dtype) for name, x in tensors.items()} for tensors in (found, needed)]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        one, other = (kind.get(name) for kind in kinds)
        if one != other:
            in_file, mine = ("none" if kind is None else f"{kind[0]} of {kind[1]}" for kind in (one, other))
            raise ValueError(
                f"Expected the {what} of the training at {path}, where {name} is {in_file}, got {mine}.\n"
                "Pass the model, the guide and the learning rates of the parts that it was begun with."
            )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = read_tensors(path, key=_KEY, writer="Fit.save")
    if header is None:
        raise ValueError(f"Expected a file written by Fit.save at {path}, got one without the header of a training.")
    if header["format"] != _FORMAT:
        raise ValueError(f"Expected format {_FORMAT} at {path}, got {header['format']}, written by a later pyro_avi.")
    return header, tensors


def _flattened(state: Mapping[str, Any] | None) -> tuple[Any, dict[str, Tensor]]:
    """The state of a torch optimizer as plain data with names in the place of tensors, and the tensors by name."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            tensors[place] = value
            return {"tensor": place}
        if isinstance(value, Mapping):
            # As pairs: keys in JSON are strings, and those of an optimizer's parameters are numbers.
            return {"items": [[key, plain(each, f"{place}/{key}")] for key, each in value.items()]}
        if isinstance(value, list | tuple):
            parts = [plain(each, f"{place}/{at}") for at, each in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": parts}
        if value is None or isinstance(value, bool | int | float | str):
            return {"plain": value}
        raise TypeError(
            f"Expected an optimizer whose state is tensors and numbers, to be saved, got a {type(value).__name__} at {place}."
        )

    return (None if state is None else plain(state, "state")), tensors


def _unflattened(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`_flattened`."""
    if plain is None:
        return None
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: _unflattened(each, tensors) for key, each in value}
    if kind == "plain":
        return value
    parts = [_unflattened(each, tensors) for each in value]
    return parts if kind == "list" else tuple(parts)
