"""What every engine promises, and what the worker processes promise beyond it."""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

from experiments.runner import engines
from experiments.runner.cell import Cell
from experiments.runner.run_cell import Context

# The cells at once that each engine is tested with: two, where it runs more than one.
JOBS = {}


def case(name):
    """The engine as a parameter of tests: skipped where it lacks a package, slow where it starts a cluster."""
    reasons = []
    for JOBS[name] in (2, 1):
        try:
            engine = engines.create(name, jobs=JOBS[name], context=Context("cpu", None, False))
        except ValueError as error:
            reasons.append(str(error))
        else:
            return pytest.param(name, marks=[pytest.mark.slow] if engine.on_clusters else [])
    return pytest.param(name, marks=pytest.mark.skip(reason=reasons[-1]))


ENGINES = [case(name) for name in engines.names()]


@pytest.fixture
def start(tiny, bench):
    """start(name): the engine with the data folder of the bench."""
    return lambda name, jobs=None: engines.create(
        name, jobs=jobs or JOBS[name], context=Context("cpu", str(bench.data), False, command="test")
    )


def cells(*kinds, first=0):
    return [Cell("tiny", {"kind": kind, "seed": seed}) for seed, kind in enumerate(kinds, first)]


def unwatched(cell, done, total, note):
    pass


def test_every_engine_is_tested_here():
    assert {case.values[0] for case in ENGINES} == set(engines.names()) >= {"processes", "ray", "serial"}


@pytest.mark.parametrize("name", ENGINES)
def test_every_cell_has_an_outcome_and_is_watched(start, name):
    wanted = cells("plain", "fail", "plain", "nan", "plain")
    steps = []
    with start(name) as engine:
        outcomes = {
            outcome.cell: outcome for outcome in engine.run(wanted, lambda cell, *step: steps.append((cell, *step)))
        }
    assert set(outcomes) == set(wanted)
    for cell, outcome in outcomes.items():
        if cell.settings["kind"] == "plain":
            assert outcome.record["key"] == cell.key and outcome.failure == ""
        else:
            assert outcome.record is None and "Traceback" in outcome.failure
        assert [step for step in steps if step[0] == cell] == [(cell, 0, 0, ""), (cell, 1, 2, "half way")]
    assert "RuntimeError: this cell always fails" in outcomes[wanted[1]].failure


@pytest.mark.parametrize("name", ENGINES)
def test_results_do_not_depend_on_the_engine(start, name):
    wanted = cells("plain", "plain", "plain")
    results = []
    for each in ("serial", name):
        with start(each) as engine:
            outcomes = {outcome.cell: outcome.record["result"] for outcome in engine.run(wanted, unwatched)}
            results.append([outcomes[cell] for cell in wanted])
    assert results[0] == results[1]


def run_pyro_programs(engine, bench):
    """Two cells that use the process's state of torch and Pyro, at the same time where the engine runs two."""
    wanted = cells("pyro", "pyro", first=3)
    outcomes = {outcome.cell: outcome for outcome in engine.run(wanted, unwatched)}
    for cell in wanted:
        assert outcomes[cell].record is not None, outcomes[cell].failure
        seed = cell.settings["seed"]
        alone = torch.randn((), generator=torch.Generator().manual_seed(seed)).item()
        assert outcomes[cell].record["result"]["value"] == [seed, alone, ["draw"]]
    assert len(bench.processes()) == engine.jobs


@pytest.mark.parametrize("name", ENGINES)
def test_cells_that_run_at_once_do_not_share_torch_and_pyro(start, bench, name):
    if JOBS[name] == 1:
        bench.go()
    with start(name) as engine:
        run_pyro_programs(engine, bench)


class Threads(engines.Engine):
    """What an engine must not be."""

    def run(self, cells, watch):
        with ThreadPoolExecutor(self.jobs) as pool:
            yield from pool.map(lambda cell: engines.attempt(cell, self.context), cells)

    def close(self):
        """Nothing is left."""


def test_threads_that_share_torch_and_pyro_are_found_out(tiny, bench, monkeypatch):
    # A process refuses a second cell: what the test above finds where it does not.
    monkeypatch.setattr("experiments.runner.run_cell._alone", nullcontext)
    with Threads(jobs=2, context=Context("cpu", str(bench.data), False)) as engine, pytest.raises(AssertionError):
        run_pyro_programs(engine, bench)
    # What threads that share it leave behind: parameters, and handlers that were removed in another order than they came.
    pyro.clear_param_store()
    _PYRO_STACK.clear()


@pytest.mark.parametrize("name", ENGINES)
def test_a_cell_is_taken_only_when_it_can_start(start, bench, name):
    taken = []

    def offer():
        for cell in cells(*["plain"] * 6):
            taken.append(cell)
            yield cell

    with start(name) as engine:
        for ended, _ in enumerate(engine.run(offer(), unwatched), 1):
            assert len(taken) <= ended - 1 + JOBS[name]
    assert len(taken) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_data_set_is_read_once_by_a_sweep(bench, name):
    process = bench.start("--kinds", ",".join(["read"] * 20), "--engine", name, jobs=JOBS[name])
    code, out, err = bench.ends(process)
    assert code == 0 and "20 cells: 20 run" in out, err
    assert (bench.data / "reads").read_text() == "read\n"
    assert len({json.loads(path.read_text())["result"]["value"] for path in bench.records()}) == 1


def test_unknown_engines_and_impossible_jobs_are_refused(start):
    with pytest.raises(ValueError, match='Unknown engine "ray2". Expected one of: processes, ray, serial'):
        start("ray2", 1)
    with pytest.raises(ValueError, match="one cell at a time, got 2 jobs"):
        start("serial", 2)


@pytest.mark.parametrize("name", ["processes", "serial"])
def test_an_engine_of_one_machine_refuses_an_address(name):
    with pytest.raises(ValueError, match=f"The engine {name} runs on this machine, .*'10.0.0.1:6379'.*--engine ray"):
        engines.create(name, jobs=1, context=Context("cpu", None, False), address="10.0.0.1:6379")


def test_an_engine_that_lacks_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install -c constraints.txt -e "\.\[cluster\]"'):
        engines.create("ray", jobs=2, context=Context("cpu", None, False))


def test_workers_are_kept_and_end_with_the_engine(start, bench):
    with start("processes") as engine:
        list(engine.run(cells(*["plain"] * 4), unwatched))
        first = bench.processes()
        list(engine.run(cells(*["plain"] * 4, first=4), unwatched))
        assert bench.processes() == first and 1 <= len(first) <= 2 and os.getpid() not in first
        assert bench.living() == first
    assert not bench.living()


def test_a_killed_worker_fails_its_cell_alone(start, bench):
    wanted = cells("plain", "die", "plain", "die", "plain")
    with start("processes") as engine:
        outcomes = {outcome.cell: outcome for outcome in engine.run(wanted, unwatched)}
    assert [outcomes[cell].record is not None for cell in wanted] == [True, False, True, False, True]
    assert "was killed by SIGKILL" in outcomes[wanted[1]].failure and "--jobs" in outcomes[wanted[1]].failure


def test_a_killed_worker_is_noticed_though_a_child_of_it_lives(start, bench):
    begin = time.monotonic()
    with start("processes", 1) as engine:
        dead, other = engine.run(cells("orphan", "plain"), unwatched)
    assert time.monotonic() - begin < 30
    bench.go()
    assert "was killed by SIGKILL" in dead.failure and other.record is not None


def test_an_idle_worker_that_was_killed_is_replaced(start, bench):
    with start("processes", 1) as engine:
        list(engine.run(cells("plain"), unwatched))
        (worker,) = bench.processes()
        os.kill(worker, signal.SIGKILL)
        bench.until(lambda: not engine._workers[0].process.is_alive())
        (outcome,) = engine.run(cells("plain", first=1), unwatched)
    assert outcome.record is not None


def test_ctrl_c_is_left_to_the_parent(start, bench):
    with start("processes", 1) as engine:

        def interrupt(cell, done, total, note):
            if done:
                (worker,) = bench.processes()
                os.kill(worker, signal.SIGINT)
                bench.go()

        (outcome,) = engine.run(cells("wait"), interrupt)
    assert outcome.record is not None


def test_leaving_the_engine_stops_what_runs(start, bench):
    with start("processes") as engine:
        running = engine.run(cells("plain", "wait", "wait"), unwatched)
        next(running)
        bench.until(lambda: 1 in bench.seeds("start"))
        begin = time.monotonic()
    assert time.monotonic() - begin < 4
    assert not bench.living()
