"""Where compiled steps are kept."""

import os
from pathlib import Path

from experiments.runner.compile_cache import keep_compiled


def test_compiled_steps_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert kept() == tmp_path / "pyro_avi"


def test_where_nothing_can_be_written_torch_keeps_its_own_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    keep_compiled()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_a_folder_that_is_named_is_kept_to(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    keep_compiled()
    assert kept() == tmp_path


def kept():
    from torch._inductor.runtime.runtime_utils import cache_dir

    return Path(cache_dir())


def test_the_cache_is_bounded(tmp_path, monkeypatch):
    # Set before, so that the end of the test brings back what was there.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "pyro_avi" / "ab"
    (folder / "locks").mkdir(parents=True)
    (folder / "locks" / "x.lock").touch()
    for age in range(8):
        (folder / f"{age}.so").write_bytes(bytes(100))
        os.utime(folder / f"{age}.so", (10_000 - age, 10_000 - age))
    keep_compiled(most=800)
    assert len(list(folder.glob("*.so"))) == 8
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    keep_compiled(most=700)
    assert sorted(path.name for path in folder.glob("*.so")) == ["0.so", "1.so", "2.so"]
    assert (folder / "locks" / "x.lock").exists()


def test_a_cache_that_the_user_names_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "x.so").write_bytes(bytes(100))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled(most=0)
    assert (tmp_path / "x.so").exists() and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
