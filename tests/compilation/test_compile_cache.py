"""Damaged files in inductor's cache."""

import _struct
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from torch.utils._filelock import FileLock

from pyro_avi.compilation.checksums import check_file, checked_loads, checksum_path
from pyro_avi.compilation.compile_cache import (
    check_libraries,
    remove_damaged,
    remove_damaged_libraries,
    warn_of_removed,
    warnings_of_inductor_ignored,
)
from tests.marks import needs_compiler

KEY = "c244b2rga7kqcbbf2xhybporem2yeo55qusvywqyipbcdmkdmkrr"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="libraries are not ELF files")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "24").mkdir()
    return tmp_path


@pytest.fixture
def library(cache):
    """A whole library under a name of inductor's."""
    return Path(shutil.copy(_struct.__file__, cache / "24" / f"{KEY}.main.so"))


@on_linux
def test_a_library_is_whole_at_one_length_alone(cache, library):
    whole = library.read_bytes()
    assert remove_damaged_libraries(cache) == []
    for length in (0, 20, 64, 5000, len(whole) // 2, len(whole) - 1):
        library.write_bytes(whole[:length])
        assert remove_damaged_libraries(cache) == [library]
        assert not library.exists()
    # As a crash of the machine leaves it.
    library.write_bytes(bytes(len(whole)))
    assert remove_damaged_libraries(cache) == [library]


@pytest.mark.parametrize("position", [0.0, 0.5, 0.999])
def test_a_flipped_bit_is_found_by_the_checksum(library, position):
    for _ in range(2):
        check_file(library)
    flip(library, position)
    with pytest.raises(RuntimeError, match=rf"{KEY}\.main\.so as it was made .*\nRemove it"):
        check_file(library)
    # As it was, and no longer when the checksum is damaged.
    flip(library, position)
    check_file(library)
    os.truncate(checksum_path(library), 10)
    with pytest.raises(RuntimeError, match="as it was made"):
        check_file(library)


def test_files_that_cannot_be_read_or_sealed_are_left_to_their_loader(library, monkeypatch):
    check_file(library.with_name("missing.so"))
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: os.open(path / "no folder", os.O_RDONLY))
    check_file(library)
    assert not checksum_path(library).exists()


def test_what_inductor_loads_is_checked(library):
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache, PyCodeCache

    module = library.with_name("module.py")
    module.write_text("value = 1")
    before = vars(CppCodeCache)["_load_library"], vars(PyCodeCache)["load_by_key_path"]
    with checked_loads():
        assert PyCodeCache.load_by_key_path("module", str(module), set_sys_modules=False).value == 1
        PyCodeCache.cache_clear()
        check_file(library)
        for path in (library, module):
            flip(path)
        with pytest.raises(RuntimeError, match="module.py as it was made"):
            PyCodeCache.load_by_key_path("module", str(module), set_sys_modules=False)
        for loader in (CppCodeCache, CppPythonBindingsCodeCache):
            with pytest.raises(RuntimeError, match="main.so as it was made"):
                loader._load_library(str(library), KEY)
    assert (vars(CppCodeCache)["_load_library"], vars(PyCodeCache)["load_by_key_path"]) == before


@on_linux
def test_a_probe_with_a_flipped_bit_is_removed_with_its_checksum(cache, library):
    probe = library.rename(library.with_name(f"{KEY}.so"))
    for _ in range(2):
        assert remove_damaged_libraries(cache) == []
    flip(probe)
    assert remove_damaged_libraries(cache) == [probe]
    assert not checksum_path(probe).exists()


@on_linux
def test_a_library_that_is_being_made_is_left(cache, library):
    library.write_bytes(b"")
    (cache / "locks").mkdir()
    with FileLock(cache / "locks" / f"{KEY}.lock"):
        assert remove_damaged_libraries(cache) == []
    assert remove_damaged_libraries(cache) == [library]


@on_linux
def test_libraries_are_checked_once(cache, library):
    library.write_bytes(b"")
    assert check_libraries() == [library]
    library.write_bytes(b"")
    assert check_libraries() == []
    assert library.exists()


def test_files_that_an_error_names_are_removed_and_no_others(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(tmp_path))
    headers = cache / "precompiled_headers"
    headers.mkdir()
    named = [cache / "24" / f"{KEY}{end}" for end in (".main.cpp", ".py")]
    header, source = headers / f"{KEY}.h.gch", headers / f"{KEY}.h"
    other = cache / "24" / f"c24{KEY[:2:-1]}.py"
    for path in (*named, header, source, other):
        path.write_text("x = 1")
    assert remove_damaged(OSError("no such symbol")) == []
    assert remove_damaged(AttributeError(f"module 'torch._inductor.{KEY}' has no attribute 'call'")) == named
    assert remove_damaged(RuntimeError(f"g++ -include {KEY}.h: fatal error: cannot read PCH file")) == [header]
    assert other.exists() and source.exists()


def test_no_warning_but_those_of_damaged_files_is_shown():
    with pytest.warns(UserWarning, match="Damaged files") as caught, warnings_of_inductor_ignored():
        warnings.warn("Something else.", stacklevel=1)
        warn_of_removed([Path("one")])
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="Damaged files"), pytest.raises(RuntimeError), warnings_of_inductor_ignored():
        warn_of_removed([Path("one")])
        raise RuntimeError


TRAINING = """
import json, warnings, pyro, torch
import pyro.distributions as dist
import pyro_avi as avi

def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    guide = avi.FactorizedGuide(model)
    losses = avi.fit(model, guide, torch.arange(4.0), num_steps=3, lr=0.1, compile=True, seed=0).losses
print(json.dumps([[str(w.message) for w in caught if w.category is UserWarning], losses.tolist()]))
"""


def train(cache, before=""):
    """The warnings and losses of a compiled training in a process of its own, after other statements."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", before + TRAINING], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cache with what a training compiled, and its losses."""
    cache = tmp_path_factory.mktemp("compiled")
    warned, losses = train(cache)
    assert not warned
    return cache, losses


def cut_to(length):
    return lambda path: os.truncate(path, min(length, path.stat().st_size // 2))


def flip(path, position=0.3, bit=4):
    """One bit, so far into the file: of a library that is in its code."""
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "names, damage, warns",
    [
        pytest.param("*.so", cut_to(20), True, marks=on_linux),
        # With the objects that it would be linked from.
        ("c*.*o", flip, True),
        ("c*.py", cut_to(3000), True),
        ("c*.py", flip, True),
        ("fxgraph/*/*/*", cut_to(500), False),
    ],
)
def test_a_damaged_cache_mends_itself(trained, tmp_path, names, damage, warns):
    whole, losses = trained
    cache = shutil.copytree(whole, tmp_path / "cache")
    # As if the graph had not been kept beside it.
    shutil.rmtree(cache / "pyro_avi_graphs")
    damaged = [path for path in cache.rglob("*") if path.is_file() and path.match(names)]
    assert damaged
    for path in damaged:
        damage(path)
    warned, found = train(cache)
    assert found == losses
    assert [text.startswith("Damaged files of the compile cache were removed") for text in warned] == [True] * warns


@pytest.mark.slow
@needs_compiler
def test_a_cut_precompiled_header_is_made_again(tmp_path, monkeypatch):
    # It lies among the temporary files, wherever the rest of the cache is.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    at_once = "from pyro_avi.toolchain import building; building.LIBRARIES_BEFORE_HEADERS = 0\n"
    _, losses = train(tmp_path / "first", at_once)
    headers = list(tmp_path.glob("torchinductor_*/precompiled_headers/*.gch"))
    if not headers:
        pytest.skip("this compiler keeps no precompiled header")
    for header in headers:
        os.truncate(header, header.stat().st_size // 2)
    warned, found = train(tmp_path / "second", at_once)
    assert [text.startswith("Damaged files of the compile cache were removed") for text in warned] == [True]
    assert found == losses
