"""The sweep `speed`: what it times, and how turns are taken."""

import argparse
import multiprocessing
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from experiments.runner.run_cell import Context
from experiments.sweeps import speed
from experiments.sweeps.speed import timing
from experiments.sweeps.speed.implementations import IMPLEMENTATIONS, Workload
from experiments.sweeps.speed.implementations.by_hand import Loss, _libraries
from experiments.sweeps.speed.rounds import Rounds
from experiments.sweeps.speed.timing import time_implementations


def cells(*argv, device="cpu", jobs=1):
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)
    return speed.plan(parser.parse_args(argv, argparse.Namespace(device=device, jobs=jobs)), {})


def test_every_workload_is_a_cell():
    found = cells()

    assert len(set(found)) == len({speed.describe(cell) for cell in found}) == 13
    assert all(speed.estimate(cell, device="cpu") > 0 for cell in found)
    assert cells("--ways", "products", "--workloads", "tiny, A-VI k=16, batch 20") == []


def test_a_device_has_cells_and_ways_of_its_own():
    here, there = cells(), cells(device="cuda")

    assert not {cell.key for cell in here} & {cell.key for cell in there} and len(here) == len(there)
    assert "on CUDA" in speed.describe(there[0]) and speed.estimate(there[0], device="cuda") > 0
    assert set(IMPLEMENTATIONS) == {way for cell in there for way in cell.settings["ways"]}
    assert {"hand graph", "tf32", "numpyro tf32"}.isdisjoint(way for cell in here for way in cell.settings["ways"])
    (asked,) = cells("--ways", "hand graph", "--workloads", "tiny, A-VI k=16, batch 20")
    assert asked.settings["ways"] == ["hand graph"]


def test_each_number_of_threads_has_a_cell_timed_by_the_clock_alone_on_the_machine():
    asked = ("--workloads", "tiny, A-VI k=16, batch 20", "--threads", "1", "2")
    found = cells(*asked)

    assert [cell.settings["threads"] for cell in found] == [1, 2]
    assert not {cell.key for cell in found} & {cell.key for cell in cells(*asked[:2])}
    assert speed.describe(found[1]) == "tiny, A-VI k=16, batch 20, threads: 2"
    for argv, other in ((asked, {"jobs": None}), (asked, {"device": "cuda"}), ((*asked, "0"), {})):
        with pytest.raises(ValueError, match="Expected --threads of at least 1 with --device cpu and --jobs 1"):
            cells(*argv, **other)


class Turns:
    """Gives two rounds of three steps."""

    def __init__(self):
        self.sent, self.left = [], 2

    def send(self, value):
        self.sent.append(value)

    def recv(self):
        self.left -= 1
        return 3 if self.left >= 0 else None


def small(kind):
    settings = {"num_rows": 24, "batch_size": 8, "latent_dim": 2, "guide": kind, "width": 4, "seed": 0}
    return {**settings, "layers": [4], "pixels": 4, "made": False}


@pytest.mark.parametrize("kind", ["constant", "amortized", "factorized"])
@pytest.mark.parametrize("way", ["eager", "hand", "svi", "products"])
def test_a_way_takes_its_turns(way, kind):
    turns = Turns()

    IMPLEMENTATIONS[way](Workload(small(kind)), Rounds(turns))

    # One message when it is ready, one for each round.
    assert len(turns.sent) == 3 and all(seconds > 0 for seconds in turns.sent)


def test_rounds_wait_for_a_device(monkeypatch):
    waits, turns = [], Turns()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(turns.sent)))

    Rounds(turns, "cuda").run(lambda: None)

    # When each of the two rounds begins, and when it ends.
    assert waits == [1, 1, 2, 2] and len(turns.sent) == 3


def test_the_time_of_a_thread_is_the_processors_and_of_several_the_clocks(monkeypatch):
    monkeypatch.setattr(time, "process_time", lambda: 1.0)

    for by_clock in (False, True):
        turns = Turns()
        Rounds(turns, by_clock=by_clock).run(lambda: None)
        assert [seconds > 0 for seconds in turns.sent] == [True, by_clock, by_clock]


def test_a_step_is_captured_once_and_launched_at_every_step(monkeypatch):
    """On stand-ins: the memory of the rows is filled anew before each launch."""
    launched, streams = [], SimpleNamespace(wait_stream=lambda other: None)
    workload = Workload(small("factorized"))
    graph = SimpleNamespace(replay=lambda: launched.append(copied[-2:]))
    copied, copy = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: (copied.append(other), copy(self, other))[1])
    for name, stand_in in {
        "Stream": lambda: streams,
        "current_stream": lambda: streams,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": lambda graph: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    # A CPU has no such steps of Adam.
    adam = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, capturable, **options: adam(*args, **options))

    IMPLEMENTATIONS["hand graph"](workload, Rounds(Turns()))

    # Three before the first round, then two rounds of three.
    assert len(launched) == 9
    calls = workload.calls()
    next(calls)
    for (x, index), (given, positions) in zip(launched, calls, strict=False):
        assert x.equal(given) and index.equal(positions)


def test_every_library_gives_the_same_product():
    one, two = torch.rand(6, 5, dtype=torch.float32).T, torch.rand(6, 3)

    for product in _libraries(one, two):
        torch.testing.assert_close(product(), one @ two)


def test_the_step_by_hand_is_the_librarys():
    settings = {
        "num_rows": 24,
        "batch_size": 8,
        "latent_dim": 2,
        "guide": "factorized",
        "width": 0,
        "seed": 0,
        "layers": [4],
        "pixels": 4,
        "made": False,
    }
    workload = Workload(settings)
    by_hand = Loss(workload)
    model, guide = workload.model_and_guide()
    x, index = workload.x[:8], torch.arange(8)
    guide.setup(x, index)
    # Nothing is random where the scales are all but zero.
    half = len(by_hand.theta) // 2
    with torch.no_grad():
        by_hand.theta[half:], by_hand.vector[:, 2:] = -30.0, -30.0
        guide.table[:, 2:], guide.global_guide.vector[half:] = -30.0, -30.0
        guide.table[:, :2], guide.global_guide.vector[:half] = by_hand.vector[:, :2], by_hand.theta[:half]

    assert by_hand(x, index).item() == pytest.approx(TraceMeanField_ELBO().loss(model, guide, x, index), rel=1e-5)


@pytest.mark.slow
def test_processes_take_turns():
    cell = next(
        cell for cell in cells("--ways", "eager", "hand graph", "hand") if cell.settings["workload"].startswith("tiny")
    )
    settings = {**cell.settings, "rounds": 2, "steps": 2, "threads": 2}

    result = time_implementations(settings, Context("cpu", None, False))

    assert set(result["ms"]) == {"eager", "hand"} and not result["warnings"]
    assert all(len(times) == 2 and min(times) > 0 for times in result["ms"].values())
    assert all(memory > 1e8 for memory in result["peak_memory_bytes"].values())
    # The one that a CPU does not have is left out, and the others go on.
    assert list(result["left_out"]) == ["hand graph"] and "CUDA" in result["left_out"]["hand graph"]
    with pytest.raises(
        RuntimeError, match="Expected a way of taking a step that can be taken here, got none: {'hand graph'"
    ):
        time_implementations({**settings, "ways": ["hand graph"]}, Context("cpu", None, False))


def test_a_way_that_is_not_ready_in_time_is_left_out_and_the_others_are_heard():
    class Process:
        killed = False

        def kill(self):
            self.killed = True

        def join(self, timeout):
            assert self.killed

        def is_alive(self):
            return False

    turns = timing._Turns({}, "cuda")
    (here, there), (silent, kept_open) = (multiprocessing.Pipe() for _ in range(2))
    turns.workers = {"slow": (Process(), silent), "fast": (Process(), here)}
    there.send((None, 2.5))

    assert turns.answers(["slow", "fast"], within=0.05) == {"fast": 2.5}
    assert list(turns.workers) == ["fast"] and turns.left_out == {"slow": "it was not ready within 0.05 s"}
    kept_open.close()


@pytest.mark.parametrize("asked", [True, False])
def test_cells_get_ready_together_and_are_timed_alone(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    both_ready, events = threading.Barrier(2), []

    def cell(name):
        with timing._Alone(asked) as alone:
            # Neither waits for the other here, or this would break.
            both_ready.wait(timeout=20)
            alone.begin()
            events.append((name, "begins"))
            time.sleep(0.1)
            events.append((name, "ends"))

    cells = [threading.Thread(target=cell, args=(name,)) for name in "ab"]
    for each in cells:
        each.start()
    for each in cells:
        each.join()
    assert len(events) == 4 and ([name for name, _ in events] in (list("aabb"), list("bbaa"))) is asked
