"""Compiled graphs kept on disk as libraries, beside inductor's cache.

A process that traces the same graph again loads its library, and no part of torch's compiler, whose import alone takes longer
than many a training. The library is the same to the last bit, and so are its numbers.
"""

import getpass
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from pyro_avi.compilation.library_graph import LibraryGraph, load_library
from pyro_avi.toolchain.processor import describe_processor

__all__ = ["cache_folder", "keep_graph", "key_of", "load_kept"]

#: The bytes of all kept libraries: of more, those that have not been loaded for the longest time are removed.
MOST_KEPT = 256 << 20

# Operations whose code is torch's or this package's; that of others may change without a new name.
_KNOWN = {"aten", "prims", "mkldnn", "pyro_avi", "_operator"}
# Variables that say where files are, not what is in them.
_PLACES = {"TORCHINDUCTOR_CACHE_DIR", "TORCH_HOME"}

# Of this process, by folder and key.
_loaded: dict[tuple[Path, str], LibraryGraph] = {}


def key_of(traced: GraphModule, inputs: Sequence[Tensor], options: Mapping[str, Any]) -> str | None:
    """A digest of all that decides the code of a compiled graph; ``None`` where that cannot be told from the graph.

    Args:
        traced: the graph as it is given to inductor.
        inputs: examples.
        options: of inductor.
    """
    lines = _lines(traced)
    # The variable by which inductor is told to keep nothing.
    if lines is None or os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") == "1":
        return None
    settings = [f"{name}={value!r}" for name, value in sorted(options.items())]
    text = "\n".join([*_shapes(inputs), *lines, *settings, *_circumstances(), *_toolchain(os.environ.get("CXX", ""))])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _shapes(inputs: Sequence[Tensor]) -> Iterator[str]:
    """What a graph is compiled for: types, shapes, strides, and which inputs share memory."""
    first: dict[int, int] = {}
    for position, x in enumerate(inputs):
        memory = first.setdefault(x.untyped_storage().data_ptr() or -position, position)
        yield f"{x.dtype} {x.device} {tuple(x.shape)} {x.stride()} {memory} {x.storage_offset() if memory != position else 0}"


def _lines(traced: GraphModule) -> list[str] | None:
    """The graph as text, a line for each node; ``None`` if it is more than known operations on its inputs."""
    lines: list[str] = []
    names: dict[Node, str] = {}

    def named(value: Any) -> Any:
        # Not as a string, which an argument may be.
        return (names[value],) if isinstance(value, Node) else value

    for position, node in enumerate(traced.graph.nodes):
        names[node] = f"%{position}"
        if node.op == "call_function":
            target: Any = node.target
            if getattr(target, "namespace", getattr(target, "__module__", None)) not in _KNOWN:
                return None
        elif node.op not in ("placeholder", "output"):
            return None
        target = node.op if node.op == "placeholder" else node.target
        lines.append(f"{target} {map_aggregate(node.args, named)} {map_aggregate(node.kwargs, named)}")
    return lines


def _circumstances() -> Iterator[str]:
    """What else in this process decides the code of a graph, or which kernels it calls."""
    yield f"{torch.get_num_threads()} {torch.get_default_dtype()} {torch.are_deterministic_algorithms_enabled()}"
    yield f"{torch.get_float32_matmul_precision()} {torch.backends.mkldnn.enabled}"
    for name, value in sorted(os.environ.items()):
        if name.startswith(("TORCH", "ATEN_", "CXX", "CPATH", "CPLUS_")) and name not in _PLACES:
            yield f"{name}={value}"
    # Settings of inductor that the program has changed.
    for name, entry in getattr(sys.modules.get("torch._inductor.config"), "_config", {}).items():
        given = entry.user_override.get() if isinstance(entry.user_override, ContextVar) else entry.user_override
        # A plain object stands for none.
        if type(given) is not object and given != entry.default:
            yield f"{name}={given!r}"


@cache
def _toolchain(compiler: str) -> list[str]:
    """What builds the libraries of this machine, and for which processor.

    Args:
        compiler: the one that the user names, if any.
    """
    found = [torch.__version__, str(torch.version.git_version), str(Path(torch.__file__).parent)]
    found += [str(sys.implementation.cache_tag), sys.platform, platform.machine()]
    found += describe_processor()
    for name in filter(None, (compiler, "g++", "clang++")):
        if path := shutil.which(name):
            status = os.stat(path)
            found.append(f"{path} {status.st_size} {status.st_mtime_ns}")
    # How this package has them built.
    package = Path(__file__).parents[1]
    sources = sorted((*package.glob("compilation/*.py"), *package.glob("toolchain/*.py")))
    return [*found, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sources)]


def cache_folder() -> Path:
    """The folder of inductor's cache, found as torch does without importing it."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given is None:
        try:
            user = getpass.getuser()
        except (KeyError, ModuleNotFoundError, OSError):
            user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
        given = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    return Path(os.path.abspath(given))


def _folder() -> Path:
    """Where libraries are kept."""
    return cache_folder() / "pyro_avi_graphs"


def load_kept(key: str | None, counts: tuple[int, int]) -> tuple[LibraryGraph | None, list[Path]]:
    """The graph that was kept by a key, ``None`` if there is none; and damaged files, which are removed.

    Args:
        key: of the graph, ``None`` if it has none.
        counts: of the tensors that it takes and returns.
    """
    folder, removed = _folder(), []
    if key is None:
        return None, []
    if (folder, key) in _loaded:
        return _loaded[folder, key], []
    for path in folder.glob(f"{key}.*.library"):
        try:
            # Before it is loaded: a library without its end kills the process.
            if _digest(path) != path.name.split(".")[1]:
                raise ImportError(path)
            graph = _loaded[folder, key] = load_library(path, counts)
        except (ImportError, OSError):
            with suppress(OSError):
                path.unlink()
                removed.append(path)
            continue
        with suppress(OSError):
            os.utime(path)
        return graph, removed
    return None, removed


def keep_graph(key: str, graph: LibraryGraph) -> None:
    """Keep the library of a graph, where anything can be written.

    Its checksum is part of its name, so that there is never one without the other.
    """
    folder = _folder()
    _loaded[folder, key] = graph
    temporary = folder / f"{key}.{os.getpid()}.{secrets.token_hex(4)}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(graph.library, temporary)
        os.replace(temporary, folder / f"{key}.{_digest(temporary)}.library")
        _prune(folder)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _prune(folder: Path) -> None:
    found = sorted((status.st_mtime, status.st_size, path) for path in folder.iterdir() for status in [path.stat()])
    excess = sum(size for _, size, _ in found) - MOST_KEPT
    for _, size, path in found:
        if excess <= 0:
            break
        path.unlink()
        excess -= size
