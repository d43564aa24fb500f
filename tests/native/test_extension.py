"""A library is built once, and what has changed of it is built again."""

import ctypes
import subprocess

import pytest

from pyro_avi.native import extension
from tests.marks import needs_compiler

SOURCE = 'extern "C" int number() { return 7; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "number.cpp"
    path.write_text(SOURCE)
    return path


@needs_compiler
def test_a_library_is_built_once(source, monkeypatch):
    built = extension.build_extension(source)
    assert ctypes.CDLL(str(built)).number() == 7
    assert sorted(path.suffix for path in built.parent.iterdir()) == [".sha256", ".so"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("built again"))
    assert extension.build_extension(source) == built


@needs_compiler
def test_a_library_that_has_changed_is_built_again(source):
    built = extension.build_extension(source)
    content = built.read_bytes()
    built.write_bytes(content[: len(content) // 2])
    assert extension.build_extension(source) == built
    assert built.read_bytes()[:4] == b"\x7fELF" and len(built.read_bytes()) == len(content)


@needs_compiler
def test_other_sources_are_other_libraries(source):
    built = extension.build_extension(source)
    source.write_text(SOURCE.replace("7", "8"))
    other = extension.build_extension(source)
    assert other != built and ctypes.CDLL(str(other)).number() == 8


@needs_compiler
def test_what_does_not_compile_leaves_nothing_behind(source):
    source.write_text("no program\n")
    with pytest.raises(subprocess.CalledProcessError):
        extension.build_extension(source)
    assert not list((source.parent / "cache" / "pyro_avi_loop").iterdir())


def test_without_a_compiler_it_says_so(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(OSError, match="no C.. compiler"):
        extension.build_extension(source)
