"""A graph that was compiled before is loaded without torch's compiler, whenever it is the same, and never when it is not."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from pyro_avi.compilation import kept_graphs
from pyro_avi.compilation.compile_cache import warnings_of_inductor_ignored
from pyro_avi.compilation.inductor import compile_graph
from pyro_avi.compilation.kept_graphs import keep_graph, key_of, load_kept
from pyro_avi.compilation.library_graph import LibraryGraph
from pyro_avi.tracing.operations import record
from tests.marks import needs_compiler

X, Y = torch.ones(2, 3), torch.ones(3)
KEY = "k" * 32


def key(function=lambda x, y: [x * 2 + y], inputs=(X, Y), options=None):
    traced, held = record(function, inputs, held_at=len(inputs))
    return key_of(traced, [*inputs, *held], {"cpp_wrapper": True} if options is None else options)


def test_the_same_graph_has_the_same_key():
    # By other names, and with what has no part in it.
    assert key() == key(lambda a, b: [torch.add(torch.mul(a, 2), b)]) == key(inputs=(X + 1, Y.clone()))


OTHERS = {
    "operation": partial(key, lambda x, y: [x * 2 - y]),
    "constant": partial(key, lambda x, y: [x * 2.0000002 + y]),
    "type of a constant": partial(key, lambda x, y: [x * 2.0 + y]),
    "argument by name": partial(key, lambda x, y: [torch.add(x * 2, y, alpha=2)]),
    "input": partial(key, lambda x, y: [x * 2 + x]),
    "order of results": partial(key, lambda x, y: [x * 2, x * 2 + y]),
    "shape": partial(key, inputs=(torch.ones(4, 3), Y)),
    "strides": partial(key, inputs=(torch.ones(3, 2).t(), Y)),
    "type": partial(key, inputs=(X.double(), Y)),
    "memory": partial(key, inputs=(X, X[0])),
    "options": partial(key, options={"cpp_wrapper": False}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_changes_a_graph_changes_its_key(name):
    assert OTHERS[name]() not in (None, key())


def test_circumstances_change_the_key(monkeypatch):
    import torch._inductor.config as config

    keys = [key()]
    for change in (
        lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
        lambda: monkeypatch.setenv("TORCHINDUCTOR_SOMETHING", "1"),
        lambda: monkeypatch.setenv("CXX", "another"),
    ):
        change()
        keys.append(key())
    with config.patch(epilogue_fusion=False):
        keys.append(key())
    assert len(set(keys)) == 5
    monkeypatch.undo()
    # A setting that is as before no longer counts.
    assert key() == keys[0]


def test_what_cannot_be_told_from_the_graph_is_not_kept(monkeypatch):
    @torch.library.custom_op("kept_graphs::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert key(lambda x, y: [twice(x)]) is None
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    assert key() is None
    assert load_kept(None, (1, 1)) == (None, [])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kept_graphs, "_loaded", {})
    return tmp_path / "pyro_avi_graphs"


def kept(tmp_path, name, content):
    """Keep what stands for a library."""
    path = tmp_path / "library.so"
    path.write_bytes(content)
    keep_graph(name, LibraryGraph(print, path, (1, 1)))
    return next((tmp_path / "pyro_avi_graphs").glob(f"{name}.*"), None)


def test_the_ones_that_were_not_loaded_for_long_go_first(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_graphs, "MOST_KEPT", 250)
    first, second = (kept(tmp_path, name, bytes(100)) for name in "ab")
    for path, day in ((first, 2), (second, 1)):
        os.utime(path, (day, day))
    third = kept(tmp_path, "c", bytes(100))
    assert sorted(folder.iterdir()) == sorted([first, third])


def test_where_nothing_can_be_written_nothing_is_kept(folder, tmp_path):
    folder.write_text("no folder")
    assert kept(tmp_path, KEY, b"x") is None
    assert load_kept(KEY, (1, 1))[0] is not None
    kept_graphs._loaded.clear()
    assert load_kept(KEY, (1, 1)) == (None, [])


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"other"), lambda path: None])
def test_what_is_damaged_or_no_library_is_removed(folder, tmp_path, damage):
    path = kept(tmp_path, KEY, b"library")
    kept_graphs._loaded.clear()
    damage(path)
    assert load_kept(KEY, (1, 1)) == (None, [path])
    assert not path.exists()


@needs_compiler
@pytest.mark.slow
def test_a_library_with_other_inputs_than_its_graph_is_not_kept(folder):
    """AOTAutograd makes one input of two that are the same tensor and change."""
    memory = torch.zeros(2)

    def function(x, y):
        x.add_(1)
        return [y * 2]

    for inputs, is_library in (([memory, torch.ones(2)], True), ([memory, memory], False)):
        traced, _ = record(function, inputs, held_at=2)
        memory.zero_()
        with torch.no_grad(), warnings_of_inductor_ignored():
            graph = compile_graph(traced, inputs, with_draws=False)
            assert isinstance(graph, LibraryGraph) is is_library
            assert torch.equal(graph(*inputs)[0], torch.full((2,), 2.0))
    assert len(list(folder.iterdir())) == 1


TRAINING = """
import json, sys, warnings, torch
import pyro_avi as avi

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.manual_seed(0)
    x = torch.rand(20, 1, 2, 2)
    model = avi.models.VAE(avi.models.DenseDecoder(2, (5,), (1, 2, 2)), size=20)
    guide = avi.AmortizedGuide(model, (4,), family=FAMILY)
    losses = avi.fit(model, guide, batches=avi.minibatches(x, batch_size=5), num_steps=20, lr=0.1, compile=True).losses
compiler = [name for name in ("torch._inductor", "torch._dynamo", "sympy") if name in sys.modules]
print(json.dumps([losses.tolist(), compiler, [str(w.message) for w in caught if w.category is UserWarning]]))
"""


def train(cache, family="None"):
    """Losses, parts of torch's compiler that were imported, and warnings of a compiled training in a process of its own."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    code = TRAINING.replace("FAMILY", family)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.slow
def test_a_second_process_trains_to_the_same_bits_without_the_compiler(tmp_path):
    first, compiler, warned = train(tmp_path)
    assert compiler and not warned
    assert train(tmp_path) == [first, [], []]
    # The twin: another graph is compiled.
    assert train(tmp_path, "avi.LowRankNormal(rank=1)")[1] == compiler
    library = min((tmp_path / "pyro_avi_graphs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(library.read_bytes())
    content[len(content) // 3] ^= 16
    library.write_bytes(content)
    again, _, (warning,) = train(tmp_path)
    assert again == first
    assert warning.startswith("Damaged files of the compile cache were removed") and str(library) in warning
    assert train(tmp_path) == [first, [], []]
