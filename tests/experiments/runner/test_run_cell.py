"""Where compiled steps are kept."""

import os
from pathlib import Path

from experiments.runner.run_cell import keep_compiled


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
