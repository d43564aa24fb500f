"""A model that two processes train is that of one process with all their rows; what goes wrong in one ends both."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pyro_avi as avi
from pyro_avi.distributed.ranks import Ranks
from pyro_avi.rows.shard import Shard
from pyro_avi.training.loaders import arguments_from_batches
from tests.distributed.trainings import GUIDES, SIZE, Model, OfAllBatches, X, build, outcome, train, without_noise
from tests.marks import needs_compiler

ROOT = Path(__file__).resolve().parents[2]


def launch(folder, what):
    """Run the program in two processes, as a user does, and return the results of each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = Path(__file__).with_name("program.py")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    subprocess.run([*command, str(program), str(folder), what], check=True, timeout=1500, env=environment)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("eager")


@pytest.fixture(scope="module")
def results(folder):
    return launch(folder, "eager")


def in_one_process(kind, noise, batches, **options):
    """The training that two processes with these batches took."""
    model, guide = build(kind)
    if noise:
        # Both batches are evaluated, and rows of two calls are no call of the guide's.
        guide.check_rows = lambda *args: None
        fit = train(model, guide, batches=list(zip(*batches, strict=True)), elbo=OfAllBatches(**options))
    else:
        whole = [tuple(map(torch.cat, zip(*shares, strict=True))) for shares in zip(*batches, strict=True)]
        with without_noise():
            fit = train(model, guide, batches=whole)
    return outcome(model, guide, fit)


def distance(one, other):
    """The largest relative distance of losses and parameters."""
    assert one.keys() == other.keys()
    return max(
        (torch.linalg.vector_norm(one[name] - other[name]) / torch.linalg.vector_norm(other[name])).item()
        for name in one
    )


def numbers(found):
    return {name: value for name, value in found.items() if name not in ("batches", "held")}


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("kind", GUIDES)
def test_two_processes_are_one_with_all_their_rows(results, kind, noise):
    both = [result["trainings"][kind, noise] for result in results]
    expected = in_one_process(kind, noise, [found["batches"] for found in both])
    assert [distance(numbers(found), expected) < 1e-9 for found in both] == [True, True]


@pytest.mark.parametrize("kind", GUIDES)
def test_a_sum_over_processes_is_another_training(results, kind):
    both = [result["trainings"][kind, True] for result in results]
    wrong = in_one_process(kind, True, [found["batches"] for found in both], mean=False)
    assert distance(numbers(both[0]), wrong) > 1e-2


def test_the_processes_end_with_the_same_bits(results):
    for key in results[0]["trainings"]:
        one, other = (numbers(result["trainings"][key]) for result in results)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_process_holds_its_own_rows(results):
    held = [result["trainings"]["factorized", True]["held"] for result in results]
    assert held == [(12, 4), (11, 4)]
    for rank, result in enumerate(results):
        rows = torch.cat([index for _, index in result["trainings"]["factorized", True]["batches"]])
        own = torch.arange(rank, SIZE, 2)
        assert rows[: len(own)].sort().values.equal(own)


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        (
            "raise",
            "FileNotFoundError: no such shard",
            "RankError: .* finish step 3, got in process 1 FileNotFoundError: no",
        ),
        (
            "raise at first",
            "FileNotFoundError: no",
            "RankError: .* checks before a training, got in process 1 FileNotF",
        ),
        (
            "nan",
            "DivergedError: .* nan at step 3.*data at site 'x'",
            "DivergedError: .* nan at step 3.*'x'.*In process 1",
        ),
        (
            "nan at first",
            "DivergedError: .*The data at site 'x'",
            "RankError: .*process 1 DivergedError: .*data at site 'x'",
        ),
        (
            "callback",
            "KeyError: 'callback'",
            "RankError: .*callbacks after step 1, got in process 1 KeyError: 'callback'",
        ),
        (
            "sizes",
            *["ValueError: .*number of rows in all 2 processes, got {'data': 23} .* {'data': 20} in process 1"] * 2,
        ),
        ("steps", *["ValueError: .*same steps.*"] * 2),
        ("same rows", *["ValueError: .*batch of its own for each of 2 processes, got the same 8 rows"] * 2),
        ("others' rows", "CallError: Expected rows 1, 3, ...", "CallError: Expected rows 0, 2, ..."),
        ("optimizer", *["ValueError: Expected optimizer=None for a FactorizedGuide"] * 2),
        ("small batch", *["ValueError: Expected batch_size of at least the number of processes, 2"] * 2),
        ("few rows", *["ValueError: Expected at least one row for each of 2 processes, got 1"] * 2),
    ],
)
def test_an_error_ends_both_with_its_message(results, name, mine, theirs):
    for result, pattern in zip(results, (theirs, mine), strict=True):
        assert re.match(pattern, ": ".join(result["errors"][name]), re.DOTALL), result["errors"][name]


def test_a_callback_in_one_process_ends_both(results):
    assert [result["errors"]["stop"] for result in results] == [4, 4]


def test_the_processes_can_train_again_after_errors(results):
    assert [result["errors"]["goes on"] for result in results] == [10, 10]


def test_a_training_that_was_killed_goes_on_from_the_last_step_that_all_have_written(results):
    for result in results:
        whole, again, finished, _ = result["resumed"]
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        assert all(torch.equal(whole[name], finished[name]) for name in whole)


def test_missing_files_of_a_process_are_told(results):
    for result in results:
        name, message = result["resumed"][-1]
        assert name == "ValueError" and "all 2 processes" in message and "those after [[8, 10], []]" in message


def test_another_number_of_processes_cannot_go_on(results, folder):
    assert (folder / "training.0-of-2").exists()
    with pytest.raises(ValueError, match="Expected the training of 1 process at .*, got that of 2"):
        train(*build("factorized"), X, resume=folder / "training")
    with pytest.raises(ValueError, match="Expected the training of 1 process at .*, got that of 2"):
        train(*build("factorized"), X, checkpoint=folder / "training")


def test_loaders_give_each_process_its_rows(results):
    for rank, result in enumerate(results):
        *amortized, rows = result["errors"]["loaders"][0]
        *factorized, own = result["errors"]["loaders"][1]
        assert amortized == factorized == [10, 10]
        assert sorted(own) == list(range(rank, SIZE, 2))
        # The sampler gives one row to both, so that both have as many.
        assert len(set(rows)) == 12


def test_a_sampler_of_several_processes_shuffles_every_epoch():
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    calls = arguments_from_batches(loader, lambda index: None, seed=0)
    epochs = [next(calls)[0].tolist() for _ in range(6)]
    assert len(set(map(tuple, epochs))) == 6


@pytest.mark.slow
@needs_compiler
def test_a_compiled_training_is_the_eager_one(results, tmp_path):
    for compiled, eager in zip(launch(tmp_path, "compiled"), results, strict=True):
        for key, found in compiled["trainings"].items():
            assert distance(numbers(found), numbers(eager["trainings"][key])) < 1e-9


def test_torch_distributed_is_to_be_initialized():
    with pytest.raises(ValueError, match=r'init_process_group\("gloo"\)'):
        train(*build("amortized"), X, distributed=True)
    with pytest.raises(TypeError, match="Expected distributed to be True, False or a process group, got 'gloo'"):
        avi.minibatches(X, batch_size=4, distributed="gloo")


def test_several_replicas_are_not_distributed():
    with pytest.raises(TypeError, match="Did you mean distributed= of avi.fit"):
        avi.fit_many([build("amortized")], X, num_steps=1, distributed=True)


def test_nccl_takes_no_tensors_of_the_cpu():
    ranks = Ranks(False)
    ranks.alone = False
    with (
        patch("torch.distributed.get_backend", return_value="nccl"),
        pytest.raises(ValueError, match="Expected a model on CUDA, .* by nccl, got one on cpu"),
    ):
        ranks.check_device(torch.device("cpu"))


class OfAllRows(Model):
    """A model that draws the rows of a batch itself."""

    def forward(self, x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x[rows])


def crossed(x):
    with pyro.plate("one", 4, dim=-2), pyro.plate("other", 5, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_shard_is_the_rows_of_the_whole_table():
    model, guide = build("factorized")
    whole, index = copy.deepcopy(guide), torch.tensor([1, 7, 22])
    guide.hold_shard(Shard(1, 3))
    assert guide.table.equal(whole.table[1::3])
    assert guide.variational_parameters(X[index], index).equal(whole.variational_parameters(X[index], index))
    with pytest.raises(ValueError, match=r"rows 1, 4, ... of plate 'data'.*, got row 2 among them"):
        guide.posterior(X[:3], torch.tensor([1, 2, 4]))
    with pytest.raises(ValueError, match=r"rows 1, 4, ... of plate 'data'.*, got all 23 in order"):
        guide.posterior(X)
    guide.hold_shard(Shard(1, 3))
    with pytest.raises(ValueError, match="process 0 of 2, got one with those of process 1 of 3"):
        guide.hold_shard(Shard(0, 2))


def test_a_new_guide_makes_its_own_rows_alone():
    guide = avi.FactorizedGuide(Model())
    guide.hold_shard(Shard(2, 3))
    assert guide.setup(X).table.equal(build("factorized")[1].table[2::3])


def test_a_shard_is_not_saved_or_extended(tmp_path):
    guide = build("factorized")[1]
    guide.hold_shard(Shard(0, 2))
    for call in (lambda: avi.save(guide, tmp_path / "guide"), lambda: guide.append_rows(2)):
        with pytest.raises(ValueError, match="Expected .* parameters of all rows.*\n.*gather_tables"):
            call()


def test_what_cannot_be_shared_says_so(tmp_path):
    guide = avi.FactorizedGuide(OfAllRows())
    guide.hold_shard(Shard(0, 2))
    with pytest.raises(ValueError, match="a model that draws the rows of plate 'data' itself"):
        guide.setup(X)(X)
    guide = avi.FactorizedGuide(crossed).setup(torch.zeros(4, 5))
    with pytest.raises(ValueError, match="Expected rows of one plate, .* got those of \\('one', 'other'\\)"):
        guide.hold_shard(Shard(0, 2))
    with pytest.raises(ValueError, match="Expected a table in memory"):
        avi.FactorizedGuide(Model(), rows_on="disk", rows_path=tmp_path).hold_shard(Shard(0, 2))
    loaded = avi.FactorizedGuide(Model())
    loaded.load_state_dict(build("factorized")[1].state_dict())
    with pytest.raises(ValueError, match="parameters were loaded and not used yet"):
        loaded.hold_shard(Shard(0, 2))
