"""Saved guides and trainings with damage of every kind: what is promised is raised, or nothing has changed."""

import json

import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pyro_avi as avi
from pyro_avi.checkpoints import file as checkpoints
from tests.damage import EXAMPLES, damaged, search, texts
from tests.test_storage import GUIDES, X, draws, model, saved


def same(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_guide_is_refused_or_the_same(tmp_path, examples):
    _, path, _ = saved("amortized", tmp_path)
    foreign = path.read_bytes()
    guide, path, _ = saved("constant", tmp_path)
    content, whole = path.read_bytes(), guide.state_dict()

    def check(damage):
        path.write_bytes(damage)
        try:
            again = avi.load(path, model)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            # As its first call would.
            assert damage in (content, foreign) or same(again.setup(X).state_dict(), whole)

    search(check, damaged(content, foreign), examples=examples)


SAVED = ("constant", "amortized", "factorized", "low rank", "flow", "crossed plates")


@pytest.mark.filterwarnings("ignore:The parameters of the model are not those")
@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_a_guide_says_of_itself_is_refused_or_makes_one(tmp_path, examples):
    """Without a checksum, as of an earlier version or by somebody who makes one: no memory, no other error."""
    files = {}
    for name in SAVED:
        _, path, _ = saved(name, tmp_path)
        with safe_open(path, framework="pt") as file:
            files[name] = json.loads(file.metadata()["pyro_avi"]), load_file(path)

    def check(name, changes):
        header, state = files[name]
        for place, value in changes:
            header = put(header, place, value)
        save_file(state, path, metadata={"pyro_avi": json.dumps(header)})
        guide = GUIDES[name][0]()
        try:
            draws(avi.load(path, guide.model, X))
        except ValueError:
            return

    places = sorted({place for header, _ in files.values() for place in places_in(header)}, key=str)
    changes = st.lists(st.tuples(st.sampled_from(places), texts()), min_size=1, max_size=2)
    search(check, st.sampled_from(SAVED), changes, examples=examples)


def places_in(value, at=()):
    """Where a part of plain data stands, of every part."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [at, *(place for key, part in inner for place in places_in(part, (*at, key)))]
        if at
        else [place for key, part in inner for place in places_in(part, (key,))]
    )


def put(whole, place, value):
    """Plain data with another part at a place, where it has it."""
    if not place:
        return value
    first, *rest = place
    if isinstance(whole, dict):
        return {**whole, first: put(whole[first], rest, value)} if first in whole else whole
    if isinstance(whole, list) and isinstance(first, int) and first < len(whole):
        return [*whole[:first], put(whole[first], rest, value), *whole[first + 1 :]]
    return whole


def trained():
    return checkpoints.SavedTraining(
        steps=2,
        num_steps=5,
        ended=False,
        settings={"seed": 3, "lr": 0.1},
        last="ab",
        values={"model/w": torch.tensor([1.0, -2.0])},
        moments={"w/mean": torch.zeros(2)},
        optimizer="torch.optim.adam.Adam",
        optimizer_state={"state": {0: {"step": torch.tensor(2.0), "rate": 0.5}}, "groups": [(1, None)]},
        losses=torch.tensor([3.0, 2.5]),
        laps=[(2, 0.5)],
        compile_seconds=0.0,
        random=[torch.arange(5, dtype=torch.uint8)],
        callbacks=[{"best": torch.tensor(2.5)}],
    )


def is_trained(found):
    saved, other = trained(), found
    return repr(saved) == repr(other)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_damaged_training_is_refused_or_the_same(tmp_path, examples):
    _, path, _ = saved("constant", tmp_path)
    foreign, path = path.read_bytes(), tmp_path / "training"
    checkpoints.write(path, trained())

    def check(damage):
        path.write_bytes(damage)
        try:
            assert is_trained(checkpoints.read(path))
        except ValueError as error:
            assert str(path) in str(error)

    content = path.read_bytes()
    assert is_trained(checkpoints.read(path))
    search(check, damaged(content, foreign), examples=examples)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_what_a_training_says_of_itself_is_refused_or_read(tmp_path, examples):
    path = tmp_path / "training"
    checkpoints.write(path, trained())
    with safe_open(path, framework="pt") as file:
        header, tensors = json.loads(file.metadata()["pyro_avi_training"]), load_file(path)

    def check(place, value):
        save_file(tensors, path, metadata={"pyro_avi_training": json.dumps(put(header, place, value))})
        try:
            checkpoints.read(path)
        except ValueError:
            return

    search(check, st.sampled_from(list(places_in(header))), texts(), examples=examples)
