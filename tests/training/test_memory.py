"""Memory does not grow with the number of steps."""

import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import pyro_avi as avi
from pyro_avi.repetition.graph_loop import GraphLoop
from pyro_avi.repetition.many_steps import ManySteps
from tests.marks import needs_compiler
from tests.training import long_run

STATUS = Path("/proc/self/statm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="reads its memory from Linux"),
]
STEPS, WARM_UP = 10_000, 1_000
# A tensor or a node of a graph kept at every step would be more.
LIMIT = 3e6


class Growth:
    """How many bytes the process grows by after the steps in which caches and the allocator settle."""

    def __init__(self):
        self.steps, self.first = 0, 0

    def __call__(self, fit=None):
        self.steps += 1
        if self.steps == WARM_UP:
            self.first = self._resident()

    @property
    def bytes(self):
        assert self.steps == STEPS
        return self._resident() - self.first

    @staticmethod
    def _resident():
        return int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_fresh_process(function, *given):
    """What the function gives in a process that no test ran in: growth could go to memory that others freed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *given).result()


def keep_at_every_step():
    growth, kept = Growth(), []
    for _ in range(STEPS):
        kept.append(torch.ones(100))
        growth()
    return growth.bytes


def train(compile, rows_on):
    x = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = avi.models.VAE(avi.models.DenseDecoder(2, (3,), (1, 2, 2)), size=20)
    batches, growth = avi.minibatches(x, batch_size=5), Growth()
    with tempfile.TemporaryDirectory() as folder:
        guide = avi.FactorizedGuide(model, rows_on=rows_on, rows_path=folder if rows_on == "disk" else None)
        avi.fit(model, guide, batches=batches, num_steps=STEPS, compile=compile, progress=False, callbacks=[growth])
    return growth.bytes


def test_what_every_step_keeps_is_seen():
    assert in_fresh_process(keep_at_every_step) > LIMIT


@pytest.mark.parametrize("rows_on", [None, "cpu", "disk"])
@pytest.mark.parametrize("compile", [pytest.param(True, marks=needs_compiler), False])
def test_memory_does_not_grow(compile, rows_on):
    assert in_fresh_process(train, compile, rows_on) < LIMIT


class SeldomGrowth(Growth):
    """The same where steps are taken in one call, and twice as many of them."""

    def next_call(self, steps):
        return WARM_UP if steps < WARM_UP else 2 * STEPS

    def __call__(self, fit=None):
        self.steps = fit.steps // 2
        if fit.steps == WARM_UP:
            self.first = self._resident()


def train_by_many():
    x = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    model = avi.models.VAE(avi.models.DenseDecoder(2, (3,), (1, 2, 2)), size=20)
    batches, growth, taken, take = avi.minibatches(x, batch_size=5), SeldomGrowth(), [], GraphLoop.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLoop, "take", lambda *given: taken.append(take(*given)) or taken[-1])
        patch.setattr(ManySteps, "longest", float("inf"))
        guide = avi.FactorizedGuide(model)
        avi.fit(model, guide, batches=batches, num_steps=2 * STEPS, compile=True, progress=False, callbacks=[growth])
    assert sum(taken) > 2 * STEPS - 10
    return growth.bytes


@needs_compiler
def test_memory_does_not_grow_with_steps_in_one_call():
    assert in_fresh_process(train_by_many) < LIMIT


def with_a_checkpoint():
    looks = long_run.run(5_000, compile=False, every=50)
    return [memory for _, memory, _ in looks], [files for *_, files in looks]


def test_memory_and_open_files_do_not_grow_with_checkpoints():
    memory, files = in_fresh_process(with_a_checkpoint)
    assert memory[-1] - memory[1] < LIMIT and len(set(files)) == 1
