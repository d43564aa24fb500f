"""What every sweep promises before a cell of it is run: cells can be planned, counted, named, timed and kept."""

import argparse
import inspect
import json
import math

import pytest

from experiments.runner import registry
from experiments.sweep import main

# The functions that a sweep offers, and the names of their arguments as `experiments.sweeps` lists them.
INTERFACE = {
    "add_arguments": ["parser"],
    "plan": ["options", "records"],
    "count": ["options"],
    "describe": ["cell"],
    "estimate": ["cell", "device"],
    "run": ["settings", "context"],
}


@pytest.fixture(params=registry.names())
def sweep(request):
    return registry.find(request.param)


@pytest.fixture
def options(sweep):
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    # With those that the command adds for every sweep.
    return parser.parse_args([], argparse.Namespace(data_dir=None, download=False, device="cpu"))


def test_it_offers_what_is_listed(sweep):
    assert isinstance(sweep.summary, str) and sweep.summary
    for name, arguments in INTERFACE.items():
        assert list(inspect.signature(getattr(sweep, name)).parameters) == arguments


def test_its_cells_can_be_told_apart(sweep, options):
    cells = sweep.plan(options, {})

    assert 1 <= len(cells) <= sweep.count(options)
    assert len({cell.key for cell in cells}) == len({sweep.describe(cell) for cell in cells}) == len(cells)
    # Planned again they are the same.
    assert [cell.key for cell in sweep.plan(options, {})] == [cell.key for cell in cells]
    for cell in cells:
        assert registry.find(cell.sweep) is sweep
        assert json.loads(json.dumps(cell.settings)) == cell.settings
        assert all(0 < sweep.estimate(cell, device=device) < math.inf for device in ("cpu", "cuda"))


def test_its_command_says_what_it_would_do(sweep, options, tmp_path, capsys):
    name = sweep.__name__.rpartition(".")[2]

    code = main([name, "--dry-run", "--device", "cpu", "--out", str(tmp_path)])

    assert code == 0
    said = capsys.readouterr().out
    assert all(sweep.describe(cell) in said for cell in sweep.plan(options, {}))
    assert list(tmp_path.iterdir()) == []
