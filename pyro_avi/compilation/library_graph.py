"""Compiled graphs for a CPU as functions of the C++ libraries that inductor builds for them."""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["LibraryGraph", "libraries_seen", "load_library"]

_ENTRY = "inductor_entry_cpp"


class LibraryGraph:
    """A compiled graph that is called in its library, without what inductor and AOTAutograd do at every call in Python.

    Args:
        entry: the function of the library.
        library: its file.
        counts: of the tensors that it takes and returns.

    Attributes:
        library: the file, whose C++ function ``inductor_entry_impl`` takes and returns handles of tensors.
        counts: as given.
    """

    def __init__(self, entry: Callable, library: Path, counts: tuple[int, int]):
        self._entry, self.library, self.counts = entry, library, counts

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results for inputs like those that it was compiled for, which are not checked; without gradients."""
        handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(inputs))
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(self._entry(handles))


def load_library(library: Path, counts: tuple[int, int]) -> LibraryGraph:
    """The graph of a library that was built before, loaded without importing inductor.

    Args:
        library: its file.
        counts: of the tensors that the graph takes and returns.

    Raises:
        ImportError: this is no such library.
        OSError: it cannot be read.
    """
    # Where the library asks for it.
    guards: Any = torch._C._dynamo.guards
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(guards._torchinductor_pyobject_tensor_data_ptr)
    name = f"{library.stem}.{_ENTRY}"
    spec: Any = importlib.util.spec_from_file_location(name, loader=ExtensionFileLoader(name, str(library)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return LibraryGraph(getattr(module, _ENTRY), library, counts)


@contextmanager
def libraries_seen() -> Iterator[list[LibraryGraph]]:
    """A context with the list of the graphs that inductor loads as libraries in it.

    Only those are among them whose library is all there is of a graph: it holds no constants of its own.
    """
    from torch._inductor import codecache

    seen: list[LibraryGraph] = []
    cache: Any = codecache.CppWrapperCodeCache
    load = cache.load_pybinding

    def load_and_note(*args: Any, **kwargs: Any) -> Callable:
        entry = load(*args, **kwargs)
        taken = re.search(r"\(input_handles, (\d+)\)", kwargs.get("main_code", ""))
        file = getattr(getattr(entry, "__self__", None), "__file__", None)
        if taken and file and entry.__name__ == _ENTRY and "num_outputs" in kwargs:
            seen.append(LibraryGraph(entry, Path(file), (int(taken[1]), kwargs["num_outputs"])))
        return entry

    cache.load_pybinding = load_and_note
    try:
        yield seen
    finally:
        # It is inherited.
        del cache.load_pybinding
