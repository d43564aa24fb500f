"""From which objects, and with which headers, inductor builds the library of a graph."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils._filelock import FileLock

from pyro_avi.toolchain import building as module
from pyro_avi.toolchain.building import LIBRARIES_BEFORE_HEADERS, build_options, building


@pytest.fixture
def codecache(monkeypatch):
    """Inductor's module, whose builds make empty files, and whose headers are named ``header``."""
    from torch._inductor import codecache

    def build(lock_path, builders):
        for builder in builders:
            if not (target := Path(builder.get_target_file_path())).exists():
                target.write_text("new")

    monkeypatch.setattr(codecache, "_worker_compile_cpp", build)
    monkeypatch.setattr(codecache, "_precompile_header", lambda *args, **kwargs: "header")
    monkeypatch.setattr(module, "_built", 0)
    return codecache


@pytest.fixture
def targets(tmp_path):
    return [tmp_path / name for name in ("one.main.o", "two.optimized.o", "one.main.so")]


def build(codecache, targets):
    builders = [SimpleNamespace(get_target_file_path=lambda path=path: str(path)) for path in targets]
    codecache._worker_compile_cpp(str(targets[0].parent / "locks" / "one.lock"), builders)


def test_headers_are_precompiled_after_so_many_libraries(codecache, targets):
    library = targets[-1]
    with building():
        for _ in range(LIBRARIES_BEFORE_HEADERS):
            assert build_options() in ({}, {"cpp_wrapper_build_separate": False})
            assert codecache._precompile_header("cpu.h") is None
            library.unlink(missing_ok=True)
            build(codecache, targets)
            # One that is there already is none that was built; a header is none either.
            build(codecache, targets)
            build(codecache, [library.with_name("header.h.gch")])
        assert codecache._precompile_header("cpu.h") == "header"
        # Kernels are compiled apart from what calls them.
        assert build_options() in ({}, {"cpp_wrapper_build_separate": True})


def test_what_an_interrupted_build_has_left_is_never_linked(codecache, targets):
    *objects, _ = targets
    for path in objects:
        path.write_text("old")
    with building():
        build(codecache, targets)
        assert [path.read_text() for path in targets] == ["new"] * 3
        # Of a whole library they stay: inductor looks for them in every process.
        objects[0].write_text("old")
        build(codecache, targets)
        assert objects[0].read_text() == "old"


def test_what_another_process_is_building_is_left(codecache, targets):
    targets[0].write_text("old")
    (targets[0].parent / "locks").mkdir()
    with building(), FileLock(targets[0].parent / "locks" / "one.lock"):
        build(codecache, targets)
    assert targets[0].read_text() == "old"


def test_afterwards_inductor_is_as_it_was(codecache):
    before = codecache._precompile_header, codecache._worker_compile_cpp
    with pytest.raises(RuntimeError), building():
        assert codecache._precompile_header is not before[0] and codecache._worker_compile_cpp is not before[1]
        raise RuntimeError
    assert (codecache._precompile_header, codecache._worker_compile_cpp) == before


@pytest.mark.parametrize("name", ["_precompile_header", "_worker_compile_cpp"])
def test_versions_of_torch_that_build_otherwise_are_left_alone(codecache, monkeypatch, name):
    monkeypatch.delattr(codecache, name)
    before = dict(vars(codecache))
    with building():
        assert vars(codecache) == before


def test_options_are_those_that_this_version_of_torch_has(codecache, monkeypatch):
    from torch._inductor import config

    assert all(hasattr(config, name) for name in build_options())
    monkeypatch.delattr(codecache, "_worker_compile_cpp")
    assert build_options() == {}
