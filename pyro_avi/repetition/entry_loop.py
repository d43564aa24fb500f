"""The loop in C++ by which the library of a compiled graph is called many times."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_avi.compilation.library_graph import LibraryGraph
from pyro_avi.native.draws import Draw, NativeDraws
from pyro_avi.native.extension import build_extension

__all__ = [
    "CannotRepeat",
    "Entry",
    "Loop",
    "Number",
    "Rows",
    "check_is_built",
    "delete_handles",
    "delete_memory",
    "entry_of",
    "new_handle",
    "new_memory",
    "take_turns",
]

#: Bytes of the buffers of a graph that are kept from step to step.
MOST_KEPT = 2**26

_SOURCE = Path(__file__).with_suffix(".cpp")
# The function of a graph in the library that inductor makes of it, as compilers write its name.
_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
# The functions of torch that the loop calls, in its order.
_OF_TORCH = (
    "aoti_torch_new_tensor_handle",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "aoti_torch__reinterpret_tensor",
)


class CannotRepeat(Exception):
    """Steps are not taken by the loop; the message says why."""


class Number(ctypes.Structure):
    """A tensor with another value at every turn: its memory, that of the values, and the bytes of one."""

    _fields_ = (("to", ctypes.c_void_p), ("from_", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Rows(ctypes.Structure):
    """A tensor of the rows of a batch: its memory, that of all rows, and the bytes of one."""

    _fields_ = (("to", ctypes.c_void_p), ("from_", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Loop(ctypes.Structure):
    """What all turns have in common, as ``entry_loop.cpp`` reads it."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("inputs", ctypes.POINTER(ctypes.c_void_p)),
        ("num_inputs", ctypes.c_int64),
        ("rows", ctypes.POINTER(Rows)),
        ("num_rows", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("draw_all", ctypes.c_void_p),
        ("draws", ctypes.POINTER(Draw)),
        ("num_draws", ctypes.c_int64),
        ("loss_is_double", ctypes.c_int32),
    )


class Entry(NamedTuple):
    """The function of a compiled graph.

    Attributes:
        address: where it is.
        library: the handle of its library.
    """

    address: int
    library: int


def entry_of(graph: Callable) -> Entry:
    """The function of a graph.

    Raises:
        CannotRepeat: if it is not one function of a library that returns one tensor.
    """
    if not isinstance(graph, LibraryGraph) or graph.counts[1] != 1:
        raise CannotRepeat("a step is not one call of a library that returns a loss")
    try:
        library = ctypes.PyDLL(str(graph.library))
        return Entry(_address(getattr(library, _ENTRY)), library._handle)
    except (OSError, AttributeError) as error:
        raise CannotRepeat(f"{graph.library} has no function of the graph") from error


def _address(function: Any) -> int:
    """Where a function is."""
    return cast(int, ctypes.cast(function, ctypes.c_void_p).value)


def new_handle(tensor: Tensor) -> int:
    """A pointer to a new reference to a tensor, which :func:`delete_handles` ends."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor])
    return pointer(capsule, None)


def delete_handles(handles: Sequence[int]) -> None:
    """End the references of :func:`new_handle`."""
    delete = _torch_library().aoti_torch_delete_tensor_object
    for handle in handles:
        delete(ctypes.c_void_p(handle))


def new_memory(entry: Entry, inputs: Any) -> int | None:
    """A place where the loop keeps the tensors that a graph makes, until :func:`delete_memory`; ``None`` where it cannot.

    Args:
        entry: of the graph.
        inputs: an array of the handles of its inputs.
    """
    library = _library()
    if not library.lead_here(ctypes.c_void_p(entry.library)):
        return None
    return library.new_memory(inputs, ctypes.c_int64(len(inputs)), ctypes.c_int64(MOST_KEPT))


def delete_memory(memory: int | None) -> None:
    """Delete the tensors that were kept."""
    if memory is not None:
        _library().delete_memory(ctypes.c_void_p(memory))


@cache
def _torch_library() -> Any:
    # With Python's lock held: a tensor may be the last reference to an object of Python.
    folder = Path(torch.__file__).parent / "lib"
    return ctypes.PyDLL(str(next(iter(sorted(folder.glob("libtorch_cpu.*"))), folder)))


@cache
def _library() -> Any:
    """The loop, ``None`` where it cannot be built, or this version of torch does not have the functions that it calls."""
    try:
        # With Python's lock held: graphs release it themselves.
        library = ctypes.PyDLL(str(build_extension(_SOURCE)))
        functions = [getattr(_torch_library(), name) for name in _OF_TORCH]
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    functions.append(ctypes.pythonapi.PyErr_Occurred)
    library.set_torch((ctypes.c_void_p * len(functions))(*map(_address, functions)))
    library.take_turns.restype, library.lead_here.restype = ctypes.c_int64, ctypes.c_int64
    library.new_memory.restype = ctypes.c_void_p
    return library


def check_is_built() -> None:
    """Build the loop where it is not there yet.

    Raises:
        CannotRepeat: if it cannot be built.
    """
    if _library() is None:
        raise CannotRepeat("the loop cannot be built")


def take_turns(loop: Loop, turns: int, positions: Tensor | None, numbers: Sequence[Number], losses: Tensor) -> int:
    """Take turns until one has a loss that is not finite; their number, with that one.

    Args:
        loop: what they have in common.
        turns: how many.
        positions: ``[turns, B]`` of the rows of each.
        numbers: what each has of its own.
        losses: ``[turns]`` of double precision, where the losses are written.

    Raises:
        RuntimeError: if a turn fails, with the message of torch.
    """
    message = ctypes.create_string_buffer(1000)
    with NativeDraws.state() as state:
        taken = _library().take_turns(
            ctypes.byref(loop),
            ctypes.c_int64(turns),
            ctypes.c_void_p(state),
            ctypes.c_void_p(None if positions is None else positions.data_ptr()),
            (Number * len(numbers))(*numbers),
            ctypes.c_int64(len(numbers)),
            ctypes.c_void_p(losses.data_ptr()),
            message,
            ctypes.c_int64(len(message)),
        )
    if taken < 0:
        raise RuntimeError(f"A compiled training step has failed: {message.value.decode(errors='replace')}.")
    return taken
