"""What a step does, by a count, and whether it is worth compiling; held to trainings that were timed."""

import csv
from pathlib import Path

import pytest
import torch

from pyro_avi.compilation.cost import Work, count_work
from tests.optimization.break_even import STEPS, share, table

TIMED = Path(__file__).parents[2] / "docs" / "results" / "speed" / "break_even.csv"


def test_operations_and_what_they_write_are_counted():
    x = torch.ones(2, 3, requires_grad=True)

    def forward():
        return (x + 1).view(6).relu_().sum()

    # An addition, the rectification in place and the sum; a view writes nothing.
    assert count_work(forward) == Work(3, 6 + 6 + 1)
    forward_and_back = count_work(lambda: torch.autograd.grad(forward(), x))
    assert forward_and_back.operations > 3 and forward_and_back.elements >= 13 + 6
    assert count_work(lambda size: torch.zeros(size), size=5) == Work(1, 5)


def test_more_work_and_more_steps_are_worth_more():
    small = Work(100, 1_000)
    assert not small.is_worth_compiling(10, 20.0) and small.is_worth_compiling(100_000, 20.0)
    # Elements are saved at every step, and cost nothing to compile.
    counts = [
        next(n for n in range(0, 10**6, 10) if Work(100, size).is_worth_compiling(n, 20.0)) for size in (0, 10**7)
    ]
    assert counts[1] < counts[0]


def test_the_faster_way_is_taken_in_trainings_that_were_timed():
    with TIMED.open() as file:
        timed = list(csv.DictReader(file))
    assert len(timed) >= 12
    shares = {(one["model"], count): share(one, count) for one in timed for count in STEPS}
    assert {chosen for chosen, _ in shares.values()} == {"eager", "compiled"}
    # It takes longer to compile than a count of its operations says, perhaps for its decompositions of matrices.
    slow_to_compile = {"gplvm": 1.2}
    assert all(ratio <= slow_to_compile.get(model, 1.1) for (model, _), (_, ratio) in shares.items())
    assert len(table(timed).splitlines()) == 2 + len(timed)


def test_a_slower_choice_would_be_seen():
    with TIMED.open() as file:
        one = next(csv.DictReader(file))
    assert share(one, 100)[0] == "eager"
    assert share({**one, "compiled first s": "0.1"}, 100)[1] == pytest.approx(
        (float(one["eager first s"]) + 0.099 * float(one["eager step ms"]))
        / (0.1 + 0.099 * float(one["compiled step ms"]))
    )


@pytest.mark.cuda
def test_what_is_written_to_a_device_is_not_counted():
    x = torch.ones(2, 3, device="cuda")
    assert count_work(lambda: (x.exp() * x).sum()) == Work(3, 0)
