"""How inductor builds the library of a graph: from which objects, and with which headers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["build_options", "building"]

#: So many libraries of a process are built before headers are precompiled: that takes 13 seconds, and saves 3 of each one.
LIBRARIES_BEFORE_HEADERS = 4

_built = 0


def build_options() -> dict[str, bool]:
    """Options of inductor for a graph whose kernels are called from C++.

    With headers precompiled what calls the kernels is compiled apart from them, with less optimization, which takes half as
    long as both together. Without them most of the time goes into headers that both include.
    """
    from torch._inductor import config

    name = "cpp_wrapper_build_separate"
    return {name: _built >= LIBRARIES_BEFORE_HEADERS} if _functions() and hasattr(config, name) else {}


@contextmanager
def building() -> Iterator[None]:
    """Within the block inductor precompiles headers when that pays, and never links what it finds of an interrupted build.

    Versions of torch that build in another way are left as they are.
    """
    from torch._inductor import codecache

    functions = _functions()
    if functions is None:
        yield
        return
    precompile, build = functions

    def precompile_if_it_pays(*args: Any, **kwargs: Any) -> str | None:
        return precompile(*args, **kwargs) if _built >= LIBRARIES_BEFORE_HEADERS else None

    def build_anew(lock_path: str, builders: Sequence[Any]) -> Any:
        global _built
        *objects, library = (Path(builder.get_target_file_path()) for builder in builders)
        if library.suffix == ".so" and not library.exists():
            _built += 1
            _remove(objects, lock_path)
        return build(lock_path, builders)

    module: Any = codecache
    module._precompile_header, module._worker_compile_cpp = precompile_if_it_pays, build_anew
    try:
        yield
    finally:
        module._precompile_header, module._worker_compile_cpp = precompile, build


def _functions() -> tuple[Callable, Callable] | None:
    """Those that precompile a header and build a library, ``None`` where torch has no such functions."""
    from torch._inductor import codecache

    precompile, build = (getattr(codecache, name, None) for name in ("_precompile_header", "_worker_compile_cpp"))
    return None if precompile is None or build is None else (precompile, build)


def _remove(objects: Sequence[Path], lock_path: str) -> None:
    """Remove objects, which have no checksum, unless another process is compiling them."""
    from torch.utils._filelock import FileLock

    os.makedirs(Path(lock_path).parent, exist_ok=True)
    with suppress(TimeoutError), FileLock(lock_path).acquire(timeout=0):
        for path in objects:
            path.unlink(missing_ok=True)
