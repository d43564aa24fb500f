"""A small library in C++, built once for a machine and kept beside what inductor has built."""

import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyro_avi.compilation.checksums import check_file, checksum_path
from pyro_avi.compilation.kept_graphs import cache_folder
from pyro_avi.toolchain.processor import describe_processor

__all__ = ["build_extension"]

_OPTIONS = ("-std=c++17", "-shared", "-fPIC")
# Seconds after which a compiler is given up.
_PATIENCE = 120


def build_extension(source: Path, *, options: Sequence[str] = ("-O2",)) -> Path:
    """The library of one source file without headers but those of the language, built where it is not there yet.

    Args:
        source: the file.
        options: of the compiler.

    Raises:
        OSError: if there is no compiler, or no folder to write to.
        subprocess.SubprocessError: if the compiler fails.
    """
    given = [os.environ.get("CXX", ""), "g++", "clang++"]
    compiler = next((found for name in given if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler")
    # Folders of caches are shared by machines.
    of = (
        source.read_text(encoding="utf-8"),
        *_OPTIONS,
        *options,
        sys.platform,
        platform.machine(),
        *describe_processor(),
    )
    key = hashlib.sha256("\n".join(of).encode()).hexdigest()[:32]
    path = cache_folder() / "pyro_avi_loop" / f"{source.stem}-{key}.so"
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may load it at any time: it is there as a whole or not at all.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        command = [compiler, *_OPTIONS, *options, str(source), "-o", str(temporary)]
        subprocess.run(command, capture_output=True, check=True, timeout=_PATIENCE)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    check_file(path)
    return path


def _is_whole(path: Path) -> bool:
    """Whether the library is there as it was made; what has changed is removed."""
    if not path.exists():
        return False
    try:
        check_file(path)
    except RuntimeError:
        path.unlink(missing_ok=True)
        checksum_path(path).unlink(missing_ok=True)
        return False
    return True
