"""What survives when a sweep is killed at random moments. `python -m tests.experiments.kills` does it hundreds of times."""

import pytest

from experiments.runner import engines
from tests.experiments.kills import Tally, survive
from tests.experiments.runner.test_engines import ENGINES


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_nothing_is_lost_doubled_or_different(tmp_path, name):
    options = [] if name == "serial" else ["--jobs", "2"]
    tally = survive(tmp_path, name, kills=5, cells=6, options=options or ["--jobs", "1"])
    assert tally == Tally(kills=5, rounds=tally.rounds, finished=tally.finished, repeated=tally.repeated)
    assert name in engines.names()
