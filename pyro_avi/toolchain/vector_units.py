"""Which vector instructions inductor compiles for, found without building programs.

Inductor asks the processor what it has, which is quick, and then builds and loads a program for each set of instructions, six
with torch's headers on a processor with AVX-512: 10 seconds, and 1.5 in every later process. What these programs tell follows
from less: whether the compiler knows the options, and whether torch brings the vector functions that they need.
"""

import ctypes
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["asked_in_full", "found_quickly", "may_be_others"]


@contextmanager
def found_quickly() -> Iterator[None]:
    """Within the block inductor builds no programs to find out about instructions.

    On other systems than Linux, on other processors than x86, and in versions of torch that ask in another way it does.
    """
    kind = _asking_class()
    if kind is None:
        yield
        return
    in_full = kind.check_build
    kind.check_build = lambda isa, code: (
        _knows_options(*isa.build_arch_flags().split()) and _has_functions(isa.bit_width())
    )
    try:
        yield
    finally:
        kind.check_build = in_full


def may_be_others(error: Exception) -> bool:
    """Whether instructions that compiler or torch do not support may have caused an error of inductor."""
    return bool(re.search(r"C\+\+ compile error|undefined symbol", "".join(traceback.format_exception(error))))


@cache
def asked_in_full() -> bool:
    """Let inductor build its programs after all, once in a process, as when a graph could not be compiled.

    Returns:
        Whether the instructions are others now.
    """
    if _asking_class() is None:
        return False
    before = _found()
    forget()
    return _found() != before


def forget() -> None:
    """Let inductor find out anew."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for kind in type(isa).__mro__:
            for method in vars(kind).values():
                # Of methods of any name, as these differ between versions of torch.
                if hasattr(method, "cache_clear"):
                    method.cache_clear()
        # Further instructions that it found beside those of the class.
        for name in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            vars(isa).pop(name, None)


def _found() -> list[tuple[str, str]]:
    from torch._inductor import cpu_vec_isa

    return [(str(isa), isa.build_arch_flags()) for isa in cpu_vec_isa.valid_vec_isa_list()]


def _asking_class() -> Any:
    """The class whose method builds the programs, ``None`` where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    from torch._inductor import cpu_vec_isa

    kind = getattr(cpu_vec_isa, "VecISA", None)
    known = all(hasattr(kind, name) for name in ("check_build", "build_arch_flags", "bit_width"))
    return kind if known else None


@cache
def _knows_options(*options: str) -> bool:
    """Whether the compiler knows these options: an empty file is an error otherwise."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), *options, "-E", "-x", "c++", "/dev/null"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@cache
def _has_functions(bits: int) -> bool:
    """Whether torch has functions of vectors of so many bits: their exponential, the only one that inductor's programs use."""
    with suppress(OSError):
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return hasattr(library, f"Sleef_expf{bits // 32}_u10")
    return False
