"""Patterns of many numbers from few probes, against patterns that are known."""

import pytest
import torch

from pyro_avi.sufficiency.patterns import Block, find_pairs

ALL = 300


def respond_as(pattern):
    """A function that responds wherever one of the chosen does; ``pattern [count, M]``."""
    return lambda chosen: chosen.double() @ pattern.double() > 0


def banded(count, offsets):
    rows = torch.arange(count)
    return sum((rows[None] - rows[:, None] == offset).int() for offset in offsets).bool()


PATTERNS = {
    "own": banded(ALL, [0]),
    "window": banded(ALL, [-1, 0, 2]),
    "everything": torch.ones(ALL, ALL, dtype=torch.bool),
    "nothing": torch.zeros(ALL, ALL, dtype=torch.bool),
    "one row more": banded(ALL, [0]).index_put((torch.tensor([137]), torch.tensor([42])), torch.tensor(True)),
    "pairs": torch.eye(ALL // 2).repeat_interleave(2, 0).repeat_interleave(2, 1).bool(),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_are_found(name):
    torch.manual_seed(0)
    pattern = PATTERNS[name]
    (found,) = find_pairs(respond_as(pattern), ALL, [Block(0, ALL, torch.arange(ALL))])
    again = torch.zeros_like(pattern)
    again[found[0], found[1]] = True
    assert torch.equal(again, pattern)


def test_what_no_rule_describes_is_not_guessed():
    torch.manual_seed(0)
    count = 600
    pattern = torch.rand(count, count) < 0.01
    assert find_pairs(respond_as(pattern), count, [Block(0, count, torch.arange(count))]) == [None]
