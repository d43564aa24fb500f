"""The engine ray: workers and machines that are lost, Ctrl-C, what a cell demands."""

import os
import signal

import pytest

from experiments.runner import engines
from experiments.runner.cell import Cell
from experiments.runner.engines import EngineError
from experiments.runner.run_cell import Context

ray = pytest.importorskip("ray", reason='needs Ray: pip install -c constraints.txt -e ".[cluster]"')
pytestmark = pytest.mark.slow


@pytest.fixture
def start(tiny, bench):
    """start(jobs): the engine on a cluster of this machine."""
    return lambda jobs: engines.create("ray", jobs=jobs, context=Context("cpu", str(bench.data), False))


@pytest.fixture
def cluster():
    """A cluster of two machines, which are processes here, with a core each: the cluster and the second machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster, second
    cluster.shutdown()


def cells(*kinds):
    return [Cell("tiny", {"kind": kind, "seed": seed}) for seed, kind in enumerate(kinds)]


def test_a_cell_whose_worker_is_lost_is_started_again(start, bench):
    wanted = cells("once", "plain", "die", "demand")
    notes = []
    with start(2) as engine:
        outcomes = {outcome.cell: outcome for outcome in engine.run(wanted, lambda cell, *step: notes.append(step[2]))}
        assert not ray.is_initialized() or len(bench.processes()) >= 2
    assert outcomes[wanted[0]].record is not None and outcomes[wanted[1]].record is not None
    assert bench.seeds("start").count(0) == 2 and bench.seeds("start").count(1) == 1
    assert outcomes[wanted[2]].record is None and "was lost 4 times" in outcomes[wanted[2]].failure
    assert bench.seeds("start").count(2) == 4 and notes.count("its worker was lost, starts again") == 4
    assert outcomes[wanted[3]].record["result"]["value"]["CPU"] == 2.0
    assert not ray.is_initialized()
    bench.until(lambda: not bench.living())


def test_an_address_where_nothing_is(tiny, monkeypatch):
    # Ray itself takes minutes to give up.
    def refuse(**options):
        raise ConnectionError(f"nothing at {options['address']}")

    monkeypatch.setattr(ray, "init", refuse)
    engine = engines.create("ray", jobs=None, context=Context("cpu", None, False), address="127.0.0.1:9")
    with pytest.raises(EngineError, match="Cannot use a Ray cluster at 127.0.0.1:9: nothing"), engine:
        list(engine.run(cells("plain"), lambda *step: None))


def test_a_machine_that_is_lost_in_the_middle(bench, cluster, tiny):
    machines, second = cluster
    kinds = ("wait", "wait", "plain", "plain", "plain")
    process = bench.start("--kinds", ",".join(kinds), "--engine", "ray", "--address", machines.address, jobs=2)
    bench.until(lambda: bench.seeds("start") == [0, 1])
    machines.remove_node(second, allow_graceful=False)
    # A worker outlives its machine here by a moment, in which it could still end its cell.
    bench.until(lambda: len(bench.living()) == 1)
    bench.go()
    code, out, err = bench.ends(process)
    assert code == 0, err
    assert "5 cells: 5 run, 0 reused, 0 failed" in out
    # One of the two was on the lost machine, and nothing else was run twice.
    assert len(bench.seeds("start")) == 6 and bench.seeds("start").count(0) + bench.seeds("start").count(1) == 3
    from experiments.runner.store import Store

    records = Store(bench.out).read("tiny").records
    with engines.create("serial", jobs=1, context=Context("cpu", str(bench.data), False)) as serial:
        for outcome in serial.run(cells(*kinds), lambda *step: None):
            assert records[outcome.cell.key]["result"] == outcome.record["result"]


@pytest.mark.parametrize("meanwhile", ["they run", "they end"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_cells_go_on_without_their_sweep_and_are_taken_up(bench, cluster, number, meanwhile):
    machines, _ = cluster
    command = ("--kinds", "wait,wait,plain", "--engine", "ray", "--address", machines.address)
    process = bench.start(*command, jobs=2)
    bench.until(lambda: bench.seeds("start") == [0, 1])
    os.killpg(process.pid, number)
    _, _, err = bench.ends(process)
    if number == signal.SIGINT:
        assert "0 of 3 cells are finished and kept, what runs on the cluster goes on: the same command" in err
    if meanwhile == "they end":
        bench.go()
        bench.until(lambda: bench.seeds("end") == [0, 1])
    again = bench.start(*command, jobs=2)
    if meanwhile == "they run":
        bench.until(lambda: (bench.out / "tiny" / "claims").exists() and len(bench.living()) == 2)
        bench.go()
    code, out, err = bench.ends(again)
    assert code == 0, err
    assert "3 cells: 3 run, 0 reused, 0 failed" in out
    assert bench.seeds("start") == [0, 1, 2] and len(bench.records()) == 3
    ray.init(address=machines.address, namespace="pyro_avi", log_to_driver=False, logging_level="ERROR")
    try:
        assert ray.util.list_named_actors() == []
    finally:
        ray.shutdown()


def test_ctrl_c(bench):
    process = bench.start("--kinds", "plain,wait,wait", "--engine", "ray", jobs=2)
    bench.until(lambda: len(bench.seeds("start")) == 3 and len(bench.records()) == 1)
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = bench.ends(process)
    assert code == 130 and "1 of 3 cells are finished and kept" in err and "Traceback" not in err
    bench.until(lambda: not bench.living())
