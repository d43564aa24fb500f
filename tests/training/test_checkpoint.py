"""A training with a checkpoint, stopped at any step and started again, is the training that never stopped."""

import itertools
import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

import pyro_avi as avi
from pyro_avi.training import training as training_module
from tests.all_guides import TO_TRAIN
from tests.marks import needs_compiler
from tests.training.test_resume import OPTIMIZERS, X, build, same, state, train

STEPS = 17


class Stop(Exception):
    """The end of a program, as far as its training can tell."""


def stopping_at(step):
    def stop(fit):
        if fit.steps == step:
            raise Stop

    return stop


def begin_again_and_again(path, make=build, run=train, *, seed=0, callbacks=list, **options):
    """The training in pieces: stopped at random steps, and begun anew each time by another program's model and guide."""
    # What is stopped before it was written begins anew, which is not what is tested here.
    draw, taken = random.Random(seed), 3
    for attempt in itertools.count():
        taken += draw.randint(1, 5)
        pair, own = make(seed=attempt), callbacks()
        try:
            fit = run(pair, STEPS, checkpoint=path, every=3, callbacks=[*own, stopping_at(taken)], **options)
        except Stop:
            continue
        assert attempt > 1
        return pair, fit, own


# --- what goes on is what never stopped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("guide", TO_TRAIN)
def test_what_is_stopped_at_random_steps_is_what_never_stopped(guide, optimizer, tmp_path):
    # Plain gradients of sums over the data are large.
    rate = 1e-5 if optimizer in ("SGD", "RAdam") else 0.05
    options = {"optimizer": OPTIMIZERS[optimizer], "lr": lambda step: rate / (1 + step)}
    whole = build(guide)
    expected = train(whole, STEPS, **options)

    pair, fit, _ = begin_again_and_again(tmp_path / "file", lambda seed: build(guide, seed), **options)

    assert torch.equal(fit.losses, expected.losses) and fit.steps == STEPS
    assert same(state(pair), state(whole))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("forgets", ["set_random_state", "the place in the batches"])
def test_the_twin_that_forgets_something_comes_to_something_else(forgets, tmp_path, monkeypatch):
    whole, begun, again = (build(seed=seed) for seed in (0, 0, 1))
    expected = train(whole, STEPS)
    with pytest.raises(Stop):
        train(begun, STEPS, checkpoint=tmp_path / "file", every=3, callbacks=[stopping_at(8)])
    batches = avi.minibatches(X, batch_size=5, seed=1)
    if forgets == "set_random_state":
        monkeypatch.setattr(training_module, forgets, lambda states: None)
    else:
        monkeypatch.setattr(type(batches), "skip", lambda self, count: None)
        monkeypatch.setattr(training_module.Beginning, "check_last", lambda self, found: None)
    assert not torch.equal(train(again, STEPS, checkpoint=tmp_path / "file").losses, expected.losses)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("guide", [*TO_TRAIN, "host"])
def test_compiled_steps_go_on_to_the_last_bit(guide, tmp_path):
    def make(seed=0):
        return build("factorized", seed, rows_on="cpu") if guide == "host" else build(guide, seed)

    whole = make()
    expected = train(whole, STEPS, compile=True)
    pair, fit, _ = begin_again_and_again(tmp_path / "file", make, compile=True)
    assert torch.equal(fit.losses, expected.losses) and same(state(pair), state(whole))
    assert fit.compile_seconds > 0 and (fit.times.diff() > 0).all()


def test_running_averages_of_baselines_go_on(tmp_path, monkeypatch):
    x = (torch.arange(48.0).view(12, 2, 2) % 3).clamp(max=1)

    def train(num_steps, **options):
        torch.manual_seed(0)
        model = avi.models.SigmoidBelief(avi.models.DenseDecoder(3, (4,), (2, 2)), size=12)
        guide = avi.AmortizedGuide(model, encoder=(4,)).setup(x, torch.arange(12))
        options |= {"elbo": avi.RaoBlackwellizedELBO("average"), "lr": 0.05, "compile": False, "progress": False}
        return avi.fit(model, guide, x, torch.arange(12), num_steps=num_steps, **options)

    whole = train(20)
    stopped = train(10)
    # Another training has averages of its own before the file is written.
    train(1)
    stopped.save(tmp_path / "saved.ckpt")
    train(10, checkpoint=tmp_path / "written.ckpt", every=5)
    for name in ("saved.ckpt", "written.ckpt"):
        assert torch.equal(train(20, resume=tmp_path / name).losses, whole.losses)
    monkeypatch.setattr(training_module, "running_averages", dict)
    train(10, checkpoint=tmp_path / "twin.ckpt", every=5)
    assert not torch.equal(train(20, resume=tmp_path / "twin.ckpt").losses, whole.losses)


def loader():
    return DataLoader(TensorDataset(X, torch.arange(len(X))), batch_size=5, shuffle=True)


BATCHES = {
    "minibatches": lambda: avi.minibatches(X, batch_size=5, seed=1),
    "minibatches, a smaller one last": lambda: avi.minibatches(X, batch_size=5, last_batch="keep", seed=1),
    "a loader": loader,
    "a list": lambda: [(X[:5], torch.arange(5)), (X[5:], torch.arange(5, 12))],
    "an iterator": lambda: itertools.cycle([(X[:7], torch.arange(7)), (X[4:], torch.arange(4, 12))]),
    "all rows": lambda: itertools.repeat((X,)),
}


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("rows_on", [None, "cpu"])
def test_the_place_in_the_batches_is_kept(batches, rows_on, tmp_path):
    def make(seed=0):
        return build("factorized", seed, rows_on=rows_on)

    def run(pair, num_steps, **options):
        options = {"lr": 0.02, "compile": False, "progress": False, "clip_norm": 1.0, "seed": 2, **options}
        return avi.fit(*pair, batches=BATCHES[batches](), num_steps=num_steps, **options)

    whole = make()
    expected = run(whole, STEPS)
    pair, fit, _ = begin_again_and_again(tmp_path / "file", make, run)
    assert torch.equal(fit.losses, expected.losses) and same(state(pair), state(whole))


def validation(pair):
    return avi.Validation(*pair, X, num_samples=5, every=2, patience=2)


def test_a_callback_with_a_state_goes_on(tmp_path):
    # The patience ends this training, which brings back its best state.
    whole = build()
    own = validation(whole)
    expected = train(whole, 40, callbacks=[own], lr=0.05)
    assert own.stopped and 8 < expected.steps < 40

    for at in (7, expected.steps - 1, None):
        pair = build(seed=0 if at == 7 else 1)
        other = validation(pair)
        try:
            stop = stopping_at(at)
            fit = train(pair, 40, checkpoint=tmp_path / "file", every=3, callbacks=[other, stop], lr=0.05)
        except Stop:
            continue
    assert torch.equal(fit.losses, expected.losses) and fit.steps == expected.steps < fit.num_steps
    assert same(state(pair), state(whole))
    assert torch.equal(other.values, own.values) and other.steps == own.steps and other.best_step == own.best_step
    # Ended by its callback it is finished: nothing more is done, by a callback neither.
    pair, calls = build(seed=2), []
    third = validation(pair)
    fit = train(pair, 40, checkpoint=tmp_path / "file", callbacks=[third, calls.append], lr=0.05)
    assert not calls and third.stopped and torch.equal(fit.losses, expected.losses) and same(state(pair), state(whole))


def test_a_finished_training_is_returned_at_once_and_more_steps_go_on(tmp_path):
    whole = build()
    expected = train(whole, STEPS)
    begun = train(build(), 9, checkpoint=tmp_path / "file", every=4)
    pair, calls = build(seed=1), []
    fit = train(pair, 9, checkpoint=tmp_path / "file", callbacks=[calls.append])
    assert not calls and fit.seconds == pytest.approx(begun.seconds) and fit.steps == fit.num_steps == 9
    assert torch.equal(fit.losses, expected.losses[:9]) and repr(fit) == repr(begun)
    fit = train(build(seed=2), STEPS, checkpoint=tmp_path / "file")
    assert torch.equal(fit.losses, expected.losses)
    # The clock goes on.
    assert fit.times[8] == pytest.approx(begun.seconds) and (fit.times.diff() > 0).all()
    # A file that was saved by hand is one as well, a finished one too.
    fit.save(tmp_path / "saved")
    assert torch.equal(train(build(seed=3), STEPS, checkpoint=tmp_path / "saved").losses, expected.losses)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.training.test_checkpoint import *

path, at, where = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def step(fit):
    if fit.steps == at and where == "in a step":
        kill()
    if fit.steps == at and where == "in a write":
        Path.replace = kill

train(build(seed=5), STEPS, checkpoint=path, every=3, callbacks=[step])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a step", "in a write"])
def test_a_process_that_is_killed_leaves_a_whole_file(where, tmp_path):
    whole = build()
    expected = train(whole, STEPS)
    # The initial values are those of the first program alone.
    with pytest.raises(Stop):
        train(build(), STEPS, checkpoint=tmp_path / "file", every=3, callbacks=[stopping_at(5)])
    before = (tmp_path / "file").read_bytes()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "file"), "8", where]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    # After step 6 it was written once more; the write after step 9 was cut off before its name.
    assert (tmp_path / "file").read_bytes() != before
    assert (tmp_path / "file.part").exists() == (where == "in a write")
    pair = build(seed=6)
    assert torch.equal(train(pair, STEPS, checkpoint=tmp_path / "file").losses, expected.losses)
    assert same(state(pair), state(whole)) and not (tmp_path / "file.part").exists()


# --- what is not gone on from


CHANGED = {
    "seed": ({"seed": 4}, "seed was 3, is 4"),
    "learning rate": ({"lr": 0.1}, r"lr at step 0 was 0.05, is 0.1"),
    "schedule": ({"lr": lambda step: 0.05 / (1 + max(step, 8))}, "lr at step 0"),
    "clipping": ({"clip_norm": 2.0}, "clip_norm was None, is 2.0"),
    "compiling": ({"compile": "auto"}, "compile was False, is auto"),
    "precision": ({"precision": "bfloat16"}, "precision was float32, is bfloat16"),
    "optimizer": ({"optimizer": torch.optim.AdamW}, r"optimizer \(class\) was None, is torch.optim.adamw.AdamW"),
    "ELBO": (
        {"elbo": avi.StickingTheLandingELBO()},
        r"elbo \(class\) was Trace_ELBO, is StickingTheLandingELBO",
    ),
    "callbacks": ({"callbacks": "validation"}, "callbacks was none, is Validation"),
    "data": ({"batches": avi.minibatches(X + 1, batch_size=5, seed=1)}, "the first batch has other values"),
    "a used iterator": ({"batches": "used"}, "the first batch has other values"),
    "later batches": ({"batches": "later"}, "the batch of step 5 has other values"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_training_is_refused_with_what_differs(case, tmp_path):
    options, message = CHANGED[case]
    train(build(), 6, checkpoint=tmp_path / "file")
    before, pair, options = (tmp_path / "file").read_bytes(), build(seed=1), dict(options)
    if options.get("callbacks"):
        options["callbacks"] = [validation(pair)]
    if options.get("batches") == "used":
        options["batches"] = avi.minibatches(X, batch_size=5, seed=1)
        next(options["batches"])
    elif options.get("batches") == "later":
        given = list(itertools.islice(avi.minibatches(X, batch_size=5, seed=1), STEPS))
        options["batches"] = [*given[:5], *given[6:]]
    pair[1].setup(X)
    untouched = state(pair)
    with pytest.raises(ValueError, match=f"(?s)after 6 steps of another: .*{message}.*same file as resume="):
        train(pair, STEPS, checkpoint=tmp_path / "file", **options)
    assert same(state(pair), untouched) and (tmp_path / "file").read_bytes() == before


def test_settings_of_an_optimizer_and_of_an_elbo_tell_trainings_apart(tmp_path):
    def adamw(decay):
        return lambda groups, lr: torch.optim.AdamW(groups, lr=lr, weight_decay=decay)

    train(build(), 6, checkpoint=tmp_path / "file", optimizer=adamw(0.1))
    with pytest.raises(ValueError, match=r"optimizer \(weight_decay\) was 0.1, is 0.2"):
        train(build(), 9, checkpoint=tmp_path / "file", optimizer=adamw(0.2))
    assert train(build(), 9, checkpoint=tmp_path / "file", optimizer=adamw(0.1)).steps == 9


REFUSED = {
    "no seed": ({"seed": None}, "Expected a seed with checkpoint=, got None"),
    "no folder": ({"checkpoint": "none/file"}, "Expected a folder for checkpoint=, found none"),
    "every": ({"every": 0}, "every of at least 1, got 0"),
    "fewer steps": ({"num_steps": 5}, "num_steps of at least the 6 taken"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = REFUSED[case]
    train(build(), 6, checkpoint="file")
    with pytest.raises(ValueError, match=message):
        train(build(), **{"num_steps": STEPS, "checkpoint": "file", **options})


def test_a_changed_bit_is_found(tmp_path):
    path = tmp_path / "file"
    train(build(), 6, checkpoint=path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="Expected"):
            train(build(), STEPS, checkpoint=path)


def test_a_disk_that_does_not_take_it_leaves_the_last_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    def fill(fit):
        if fit.steps == 5:
            monkeypatch.setattr("os.fsync", full)

    with pytest.raises(OSError, match="No space left"):
        train(build(), STEPS, checkpoint=tmp_path / "file", every=3, callbacks=[fill])
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    whole = build()
    expected = train(whole, STEPS)
    assert torch.equal(train(build(), STEPS, checkpoint=tmp_path / "file").losses, expected.losses)


def test_a_file_of_the_first_format_is_gone_on_from(tmp_path):
    whole = build()
    expected = train(whole, 9)
    train(build(), 4).save(tmp_path / "file")
    from safetensors import safe_open

    with safe_open(tmp_path / "file", framework="pt") as file:
        header = json.loads(file.metadata()["pyro_avi_training"])
    header = {"format": 1, "steps": 4, "optimizer": None, "optimizer_state": None} | {"extra": header["steps"]}
    tensors = load_file(tmp_path / "file")
    save_file(tensors, tmp_path / "old", metadata={"pyro_avi_training": json.dumps(header)})
    fit = train(build(seed=1), 9, resume=tmp_path / "old")
    assert torch.equal(fit.losses, expected.losses)
    # Its clock was not kept.
    assert fit.times[:4].isnan().all() and fit.times[4:].isfinite().all()
    with pytest.raises(ValueError, match="after 4 steps of another"):
        train(build(seed=1), 9, checkpoint=tmp_path / "old")


# --- recovery


def batches_with(value, at):
    """The batches of ``train``, a number of one of them replaced."""
    given = [(x.clone(), index) for x, index in itertools.islice(avi.minibatches(X, batch_size=5, seed=1), STEPS)]
    given[at][0][0, 0, 0, 0] = value
    return given


@pytest.mark.parametrize("guide", TO_TRAIN)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_training_whose_data_are_mended_goes_on_from_the_last_finite_state(guide, value, tmp_path):
    path = tmp_path / "file"
    with pytest.raises(
        avi.DivergedError, match=f"(?s)at step 7.*data at site 'x'.*resume='{re.escape(str(path))}'"
    ) as error:
        train(build(guide), STEPS, checkpoint=path, every=3, batches=batches_with(value, 7))
    assert error.value.step == 7 and error.value.checkpoint == str(path)
    # The same again ends the same way.
    with pytest.raises(avi.DivergedError, match="at step 7"):
        train(build(guide, 1), STEPS, checkpoint=path, every=1, batches=batches_with(value, 7))
    whole, pair = build(guide), build(guide, 1)
    expected = train(whole, STEPS, batches=batches_with(0.5, 7))
    assert torch.equal(train(pair, STEPS, checkpoint=path, batches=batches_with(0.5, 7)).losses, expected.losses)
    assert same(state(pair), state(whole))


class Cliff(torch.autograd.Function):
    """Whose value is finite and whose gradient is not, where it has been armed."""

    armed = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("nan") if Cliff.armed else grad


@pytest.mark.parametrize("armed_at", [6, 7, STEPS - 1])
def test_a_gradient_that_is_not_finite_overwrites_no_checkpoint(armed_at, tmp_path, monkeypatch):
    path = tmp_path / "file"

    def make(seed=0):
        pair = build(seed=seed)
        inner = pair[0].decoder.forward
        pair[0].decoder.forward = lambda z: Cliff.apply(inner(z))
        return pair

    def arm(fit):
        monkeypatch.setattr(Cliff, "armed", fit.steps == armed_at)

    with pytest.raises(avi.DivergedError, match="(?s)gradient.*resume=") as error:
        train(make(), STEPS, checkpoint=path, every=1, callbacks=[arm])
    monkeypatch.setattr(Cliff, "armed", False)
    # The last state before the gradient was taken.
    assert error.value.step == armed_at + 1 and error.value.kept is not None
    # On request: another rate is another training, unless its state is to be gone on from.
    with pytest.raises(ValueError, match="lr at step 0"):
        train(make(1), STEPS, checkpoint=path, lr=0.001)
    pair, begun = make(2), make()
    fit = train(pair, STEPS, checkpoint=path, resume=path, lr=0.001)
    train(begun, armed_at).save(tmp_path / "other")
    expected = train(begun, STEPS, resume=tmp_path / "other", lr=0.001)
    assert torch.equal(fit.losses, expected.losses) and same(state(pair), state(begun))
    # The same command, if it is killed, goes on from its own file by now.
    assert train(make(3), STEPS, checkpoint=path, resume=path, lr=0.001).steps == STEPS
