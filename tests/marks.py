"""Marks that several modules of tests share."""

import shutil

import pytest

__all__ = ["needs_compiler"]

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor compiles C++ on a CPU"
)
