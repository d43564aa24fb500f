"""The file of a training: tensors as safetensors, all else as JSON in the header; reading runs no code of the file."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_avi.checkpoints.plain import flattened, unflattened
from pyro_avi.tensor_files import read_tensors, write_tensors

__all__ = ["SavedTraining", "check_same_tensors", "read", "write"]

_FORMAT, _KEY = 2, "pyro_avi_training"

# From each earlier format to the next. Files of format 1 have no settings, and no clock before they were written.
_MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: lambda header: (
        header
        | {
            "num_steps": header["steps"],
            "ended": False,
            "settings": None,
            "last": None,
            "laps": [[header["steps"], 0.0]],
            "compile_seconds": 0.0,
            "optimizer_state": header["optimizer_state"] or {"plain": None},
            "callbacks": {"list": []},
        }
    )
}


@dataclass
class SavedTraining:
    """Everything that decides how a training goes on.

    Attributes:
        steps: the number of steps taken.
        num_steps: the number that was asked for.
        ended: whether all of them are taken, or a callback has ended the training.
        settings: what decides its numbers; ``None`` in files of format 1.
        last: a hash of the batch of the last step.
        values: parameters and buffers by name.
        moments: those of Adam.
        optimizer: the class of the user's optimizer, and ``optimizer_state`` its state.
        callbacks: the states of callbacks that have one.
        losses: ``[steps]``.
        laps: numbers of steps and the seconds until then, the last one of all steps.
        compile_seconds: of these the seconds in which steps were compiled.
        random: the random states of the CPU and of each CUDA device.
    """

    steps: int
    num_steps: int
    ended: bool
    settings: dict[str, Any] | None
    last: str | None
    values: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer: str | None
    optimizer_state: Any
    losses: Tensor
    laps: list[tuple[int, float]]
    compile_seconds: float
    random: list[Tensor]
    callbacks: list[Any] = field(default_factory=list)


_IN_HEADER = ("steps", "num_steps", "ended", "settings", "last", "optimizer", "compile_seconds")


def write(path: str | PathLike, saved: SavedTraining) -> None:
    """Write a training to a file, which is replaced whole or not at all.

    Raises:
        TypeError: if the state of the optimizer or of a callback is not of tensors and numbers.
        OSError: if the disk does not take it.
    """
    optimizer_state, optimizer_tensors = flattened(saved.optimizer_state, "an optimizer")
    callbacks, callback_tensors = flattened(saved.callbacks, "callbacks")
    tensors = {f"value/{name}": value for name, value in saved.values.items()}
    tensors |= {f"moment/{name}": value for name, value in saved.moments.items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors.items()}
    tensors |= {f"callback/{name}": value for name, value in callback_tensors.items()}
    tensors |= {f"random/{device}": value for device, value in enumerate(saved.random)} | {"losses": saved.losses}
    header = {"format": _FORMAT} | {name: getattr(saved, name) for name in _IN_HEADER}
    header |= {"optimizer_state": optimizer_state, "callbacks": callbacks, "laps": saved.laps}
    write_tensors(Path(path), tensors, header, key=_KEY)


def read(path: str | PathLike) -> SavedTraining:
    """The training in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of something else, or of a format to come.
    """
    header, tensors = read_tensors(Path(path), key=_KEY, writer="avi.fit")
    if header is None:
        raise ValueError(f"Expected a file written by avi.fit at {path}, got one without the header of a training.")
    try:
        written = header["format"]
        if written > _FORMAT:
            raise ValueError(f"Expected format {_FORMAT} at {path}, got {written}, written by a later pyro_avi.")
        for old in range(written, _FORMAT):
            header = _MIGRATIONS[old](header)
        return _parsed(header, tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected a whole file written by avi.fit at {path}, got a damaged one: {error!r}."
        ) from error


def _parsed(header: dict[str, Any], tensors: dict[str, Tensor]) -> SavedTraining:
    parts: dict[str, dict[str, Tensor]] = {
        kind: {} for kind in ("value", "moment", "optimizer", "callback", "random", "losses")
    }
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    return SavedTraining(
        **{name: header[name] for name in _IN_HEADER},
        values=parts["value"],
        moments=parts["moment"],
        optimizer_state=unflattened(header["optimizer_state"], parts["optimizer"]),
        losses=parts["losses"][""],
        laps=[(steps, seconds) for steps, seconds in header["laps"]],
        random=[parts["random"][str(device)] for device in range(len(parts["random"]))],
        callbacks=unflattened(header["callbacks"], parts["callback"]),
    )


def check_same_tensors(
    path: str | PathLike, what: str, found: Mapping[str, Tensor], needed: Mapping[str, Tensor]
) -> None:
    """Refuse tensors of a file whose names, shapes or types are not those that a training has.

    Args:
        path: of the file.
        what: they are, for the message.
        found, needed: those of the file and of the training.

    Raises:
        ValueError: if they differ.
    """
    kinds = [{name: (tuple(x.shape), x.dtype) for name, x in tensors.items()} for tensors in (found, needed)]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        one, other = (kind.get(name) for kind in kinds)
        if one != other:
            in_file, mine = ("none" if kind is None else f"{kind[0]} of {kind[1]}" for kind in (one, other))
            raise ValueError(
                f"Expected the {what} of the training at {path}, where {name} is {in_file}, got {mine}.\n"
                "Pass the model, the guide and the learning rates of the parts that it was begun with."
            )
