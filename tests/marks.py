"""Marks that several modules of tests share, and what decides which cases have one."""

import shutil
import zlib

import pytest

__all__ = ["needs_compiler", "number_of"]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor compiles C++ on a CPU"
)


def number_of(name: str) -> int:
    """A number that follows from a name: what is taken by it stays as it is when a case is added before it."""
    return zlib.crc32(name.encode())
