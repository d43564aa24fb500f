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

from pyro_avi.compilation.compile_cache import (
    check_libraries,
    remove_cut_libraries,
    remove_damaged,
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
    assert remove_cut_libraries(cache) == []
    for length in (0, 20, 64, 5000, len(whole) // 2, len(whole) - 1):
        library.write_bytes(whole[:length])
        assert remove_cut_libraries(cache) == [library]
        assert not library.exists()
    # As a crash of the machine leaves it.
    library.write_bytes(bytes(len(whole)))
    assert remove_cut_libraries(cache) == [library]


@on_linux
def test_a_library_that_is_being_made_is_left(cache, library):
    library.write_bytes(b"")
    (cache / "locks").mkdir()
    with FileLock(cache / "locks" / f"{KEY}.lock"):
        assert remove_cut_libraries(cache) == []
    assert remove_cut_libraries(cache) == [library]


@on_linux
def test_libraries_are_checked_once_with_one_warning(cache, library):
    library.write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"^Damaged files .*{KEY}\.main\.so\.$") as caught:
        check_libraries()
    assert len(caught) == 1
    library.write_bytes(b"")
    check_libraries()
    assert library.exists()


def test_files_that_an_error_names_are_removed_and_no_others(cache, monkeypatch, tmp_path):
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.default_cache_dir", lambda: str(tmp_path))
    headers = cache / "precompiled_headers"
    headers.mkdir()
    named = [cache / "24" / f"{KEY}{end}" for end in (".main.cpp", ".py")]
    header = headers / f"{KEY}.h.gch"
    other = cache / "24" / f"c24{KEY[:2:-1]}.py"
    for path in (*named, header, other):
        path.write_text("x = 1")
    assert remove_damaged(OSError("no such symbol")) == []
    assert remove_damaged(AttributeError(f"module 'torch._inductor.{KEY}' has no attribute 'call'")) == named
    assert remove_damaged(RuntimeError(f"g++ -include {KEY}.h: fatal error: cannot read PCH file")) == [header]
    assert other.exists()


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


def train(cache):
    """The warnings and losses of a compiled training in a process of its own."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, "-c", TRAINING], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A cache with what a training compiled, and its losses."""
    cache = tmp_path_factory.mktemp("compiled")
    warned, losses = train(cache)
    assert not warned
    return cache, losses


def cut(cache, names, length):
    found = [path for path in cache.rglob("*") if path.is_file() and path.match(names)]
    assert found
    for path in found:
        os.truncate(path, min(length, path.stat().st_size // 2))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "names, length, warns",
    [pytest.param("*.so", 20, True, marks=on_linux), ("c*.py", 3000, True), ("fxgraph/*/*/*", 500, False)],
)
def test_a_damaged_cache_mends_itself(trained, tmp_path, names, length, warns):
    whole, losses = trained
    cache = shutil.copytree(whole, tmp_path / "cache")
    cut(cache, names, length)
    warned, found = train(cache)
    assert found == losses
    assert [text.startswith("Damaged files of the compile cache were removed") for text in warned] == [True] * warns
