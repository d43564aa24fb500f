"""Checksums beside files that inductor loads from its cache: a flipped bit in one is a crash or other numbers, no error."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["check_file", "checked_loads", "checksum_path"]


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file of the cache is."""
    return path.with_name(f"{path.name}.sha256")


def check_file(path: Path) -> None:
    """Compare a file of the cache with the checksum beside it, or write one where there is none yet.

    Raises:
        RuntimeError: the file, or its checksum, has changed since that was written. The message names the file.
    """
    beside = checksum_path(path)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest().encode()
    except OSError:
        # Whoever loads it says why it cannot be read.
        return
    with suppress(FileNotFoundError):
        expected = beside.read_bytes()
        if expected != found:
            raise RuntimeError(
                f"Expected the compiled file {path} as it was made (SHA-256 {expected.decode(errors='replace')[:64]}), got "
                f"{found.decode()}.\nRemove it: it is compiled again."
            )
        return
    temporary = beside.with_name(f"{beside.name}.{os.getpid()}.{secrets.token_hex(4)}")
    # A folder that nothing can be written to is used as it is.
    with suppress(OSError):
        temporary.write_bytes(found)
        os.replace(temporary, beside)


@contextmanager
def checked_loads() -> Iterator[None]:
    """Within the block inductor loads libraries and modules from its cache only when :func:`check_file` has passed them."""
    from torch._inductor import codecache

    libraries: Any = codecache.CppCodeCache
    modules: Any = codecache.PyCodeCache
    load_library, load_module = vars(libraries)["_load_library"], vars(modules)["load_by_key_path"]

    def checked_library(cls: Any, path: str, key: str) -> Any:
        check_file(Path(path))
        return load_library.__func__(cls, path, key)

    def checked_module(cls: Any, key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        check_file(Path(path))
        return load_module.__func__(cls, key, path, *args, **kwargs)

    libraries._load_library = classmethod(checked_library)
    modules.load_by_key_path = classmethod(checked_module)
    try:
        yield
    finally:
        libraries._load_library, modules.load_by_key_path = load_library, load_module
