"""Between two stops nothing happens but steps."""

import pytest

from pyro_avi.repetition.stops import Stops


class Wants:
    """A callback that names the steps after which it wants to be called."""

    def __init__(self, *steps):
        self.steps, self.called = steps, []

    def next_call(self, steps):
        return next((step for step in self.steps if step > steps), 10**9)

    def __call__(self, result):
        self.called.append(result)
        return result == 7


def all_stops(stops, start, num_steps):
    found = [start]
    while found[-1] < num_steps:
        found.append(stops.next(found[-1]))
    return found[1:]


def test_losses_are_checked_and_times_read_as_ever():
    stops = Stops([], 0, 350, None)
    assert all_stops(stops, 0, 350) == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 350]
    assert [n for n in range(1, 351) if stops.laps(n)] == [1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 350]
    assert [n for n in range(1, 351) if stops.checks(n)] == [100, 200, 300, 350]


@pytest.mark.parametrize("start", [0, 3, 100, 117])
def test_no_event_lies_between_two_stops(start):
    callback = Wants(5, 90, 130)
    stops = Stops([callback], start, 250, 40)
    found = all_stops(stops, start, 250)
    assert found == sorted(set(found)) and found[-1] == 250
    happens = [n for n in range(start + 1, 251) if stops.laps(n) or stops.checks(n) or stops.writes(n)]
    assert set(happens) <= set(found)
    assert {n for n in range(start + 1, 251) if stops.writes(n)} == {n for n in range(40, 250, 40) if n > start}


def test_callbacks_are_called_when_they_want_to_be_and_at_the_end():
    wants, always = Wants(5, 90), []
    stops = Stops([wants, always.append], 0, 100, None)
    assert all_stops(stops, 0, 3) == [1, 2, 3]
    for taken in range(1, 101):
        assert stops.calls(taken)
        stops.call(taken, taken)
    assert wants.called == [5, 90, 100] and always == list(range(1, 101))


def test_a_callback_that_wants_no_call_before_the_end_stops_nothing():
    stops = Stops([wants := Wants(5)], 0, 1000, None)
    assert [n for n in range(1, 1001) if stops.calls(n) and (stops.call(n, n), n)] == [5, 1000]
    assert stops.next(101) == 200 and wants.called == [5, 1000]


def test_one_callback_ends_the_training_and_the_others_are_still_called():
    stops = Stops([Wants(7), last := Wants(7)], 0, 100, None)
    assert stops.call(7, 7) and last.called == [7]
    assert not Stops([Wants(6)], 0, 100, None).call(6, 6)
