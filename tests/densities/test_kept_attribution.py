"""Which rows own which factors, kept from call to call: never where anything changed that decides it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_avi as avi
from pyro_avi.densities import attribution
from pyro_avi.densities.blocks import Owners
from pyro_avi.densities.kept import Kept
from pyro_avi.densities.program_digest import ProgramDigest
from tests.measured.cases import cases, make
from tests.measured_structures import STRUCTURES

ROWS = 8
X = torch.linspace(-2.0, 3.0, ROWS)
ONE, OTHER = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 7, 6]


@pytest.fixture
def searches(monkeypatch):
    """The calls whose rows were searched, with nothing kept at first."""
    calls, find = [], attribution._find

    def counted(call):
        calls.append(call)
        return find(call)

    monkeypatch.setattr(attribution, "_find", counted)
    monkeypatch.setattr(attribution, "_KEPT", Kept())
    return calls


def forget():  # within `searches`, which restores what was kept
    attribution._KEPT = Kept()


class Model(nn.Module):
    """Rows with a latent each and observations in another plate, which a state of any kind distributes."""

    def __init__(self, observe: Callable[["Model", torch.Tensor], torch.Tensor], **state):
        super().__init__()
        self.observe = observe
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("observations", ROWS):
            pyro.sample("x", dist.Normal(self.observe(self, z), 0.5), obs=x)


def lagged(z):
    return torch.cat([torch.zeros(1), z[:-1]])


def in_place(name, value):
    def change(model):
        with torch.no_grad():
            getattr(model, name).copy_(value)

    return change


def assign(name, value):
    return lambda model: setattr(model, name, value)


def swapped(matrix):
    return matrix[OTHER]


EYE = torch.eye(ROWS)


@dataclass(frozen=True)
class Change:
    """A model, and a change of its state after which other rows own its observations."""

    make: Callable[[], Model]
    change: Callable[[Model], None]


CHANGES = {
    "two positions in a buffer": Change(
        lambda: Model(lambda m, z: z[m.index], index=torch.tensor(ONE)), in_place("index", torch.tensor(OTHER))
    ),
    "two positions in a list": Change(
        lambda: Model(lambda m, z: z[m.index], index=list(ONE)), assign("index", list(OTHER))
    ),
    "two positions in an array": Change(
        lambda: Model(lambda m, z: z[torch.from_numpy(m.index)], index=np.array(ONE)), assign("index", np.array(OTHER))
    ),
    "two positions, one by one": Change(
        lambda: Model(lambda m, z: torch.stack([z[i] for i in m.index]), index=list(ONE)), assign("index", list(OTHER))
    ),
    "a branch": Change(lambda: Model(lambda m, z: z + lagged(z) if m.tied else z, tied=False), assign("tied", True)),
    "a number": Change(lambda: Model(lambda m, z: z + m.weight * lagged(z), weight=0.0), assign("weight", 1.0)),
    "a matrix": Change(lambda: Model(lambda m, z: m.matrix @ z, matrix=EYE.clone()), in_place("matrix", swapped(EYE))),
    "a view of a matrix": Change(
        lambda: Model(lambda m, z: m.matrix[1:] @ z, matrix=torch.cat([EYE[:1], EYE])),
        in_place("matrix", torch.cat([EYE[:1], swapped(EYE)])),
    ),
    "a mask": Change(
        lambda: Model(lambda m, z: z.masked_fill(m.mask, 0.0) + z[OTHER].masked_fill(~m.mask, 0.0), mask=EYE[0].bool()),
        in_place("mask", EYE[6].bool()),
    ),
    "a parameter that was zero": Change(
        lambda: Model(lambda m, z: z + m.weight * lagged(z), weight=nn.Parameter(torch.zeros(()))),
        in_place("weight", torch.tensor(0.3)),
    ),
    "one parameter of many that was zero": Change(
        lambda: Model(lambda m, z: z + m.weight * lagged(z), weight=nn.Parameter(torch.zeros(ROWS))),
        in_place("weight", 0.3 * EYE[4]),
    ),
    "a parameter that opens a gate": Change(
        lambda: Model(lambda m, z: z + m.weight.relu() * lagged(z), weight=nn.Parameter(-torch.ones(ROWS))),
        in_place("weight", EYE[4] - 0.5),
    ),
    "a parameter that chooses": Change(
        lambda: Model(lambda m, z: z[m.weight.argsort()], weight=nn.Parameter(torch.tensor(ONE).float())),
        in_place("weight", torch.tensor(OTHER).float()),
    ),
    "a frozen parameter": Change(
        lambda: Model(
            lambda m, z: z + m.weight * lagged(z), weight=nn.Parameter(torch.zeros(ROWS), requires_grad=False)
        ),
        in_place("weight", 0.3 * EYE[4]),
    ),
}


def weigh(model, guide):
    return avi.log_weights(model, guide, X, num_samples=2, plate="data", progress=False)


def structure(model, guide):
    found = attribution.attribute(model, guide, (X,), {}, ("data",))
    return [blocks.tolist() for blocks in found.blocks.values()], [each.blocks.tolist() for each in found.owners[0]]


@pytest.mark.parametrize("case", CHANGES)
def test_what_changes_the_owners_is_seen(searches, case):
    model = CHANGES[case].make()
    guide = avi.FactorizedGuide(model, plate="data").setup(X)
    before = structure(model, guide)
    assert structure(model, guide) == before and len(searches) == 1
    CHANGES[case].change(model)
    after, weights = structure(model, guide), weigh(model, guide)
    forget()
    fresh = weigh(model, guide)
    assert torch.equal(weights.local, fresh.local) and torch.equal(weights.global_, fresh.global_)
    # Otherwise a kept answer would have done.
    assert structure(model, guide) == after != before


def test_the_arguments_of_a_call_count(searches):
    def model(x, group):
        with pyro.plate("data", ROWS):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("observations", ROWS):
            pyro.sample("x", dist.Normal(z[group], 0.5), obs=x)

    one, other = torch.tensor(ONE), torch.tensor(OTHER)
    guide = avi.FactorizedGuide(model, plate="data").setup(X, one)
    kept = [avi.log_weights(model, guide, X, group, num_samples=2, plate="data").local for group in (one, other, one)]
    assert len(searches) == 2 and torch.equal(kept[0], kept[2])
    forget()
    assert torch.equal(kept[1], avi.log_weights(model, guide, X, other, num_samples=2, plate="data").local)
    assert not torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("case", ["a branch", "a matrix", "two positions in a list"])
def test_a_kept_answer_is_checked_before_it_is_used(monkeypatch, searches, case):
    # Were the digest blind, the check would find what is wrong here: for two observations of eight in half of all changes.
    monkeypatch.setattr(ProgramDigest, "digest", lambda self: b"the same")
    model = CHANGES[case].make()
    guide = avi.FactorizedGuide(model, plate="data").setup(X)
    before = structure(model, guide)
    CHANGES[case].change(model)
    uses = [structure(model, guide) for _ in range(12)]
    assert uses[-1] != before and len(searches) == 2
    forget()
    assert structure(model, guide) == uses[-1]


def test_a_wrong_answer_is_not_kept_by_its_check(searches):
    model = CHANGES["a branch"].make()
    guide = avi.FactorizedGuide(model, plate="data").setup(X)
    right = structure(model, guide)
    (digest, (found, size, _)), *others = attribution._KEPT._answers.items()
    assert not others
    observed = found.owners[0][1]
    wrong = Owners(observed.blocks.roll(1), ROWS)
    attribution._KEPT.keep(digest, replace(found, owners=([found.owners[0][0], wrong], found.owners[1])), size)
    assert structure(model, guide) == right and len(searches) == 2


@cases("log_weights", one_kind=True)
def test_numbers_are_those_of_a_search_at_every_call(searches, kind, name):
    model, guide = make(kind, name)
    weights = [avi.log_weights(model, guide, *STRUCTURES[name].args, num_samples=2) for _ in range(3)]
    assert len(searches) == 1
    forget()
    weights.append(avi.log_weights(model, guide, *STRUCTURES[name].args, num_samples=2))
    assert len(searches) == 2
    first = weights[0]
    for one in weights[1:]:
        assert torch.equal(one.local, first.local) and torch.equal(one.global_, first.global_)
        assert (one.scale, one.has_globals, one.is_estimate) == (first.scale, first.has_globals, first.is_estimate)


def test_training_keeps_the_answer(searches):
    x = torch.rand(20, 1, 8, 8)
    model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
    guide = avi.AmortizedGuide(model).setup(x)
    avi.fit(model, guide, x, num_steps=2, progress=False)
    first = avi.log_weights(model, guide, x, num_samples=2)
    avi.fit(model, guide, x, num_steps=3, progress=False)
    second = avi.log_weights(model, guide, x, num_samples=2)
    assert len(searches) == 1 and not torch.equal(first.local, second.local)
    forget()
    assert torch.equal(avi.log_weights(model, guide, x, num_samples=2).local, second.local)


def test_guides_of_the_same_kind_share_the_answer(searches):
    model = CHANGES["a branch"].make()
    for _ in range(3):
        weigh(model, avi.FactorizedGuide(model, plate="data").setup(X))
    assert len(searches) == 1


def test_users_cannot_change_what_is_kept(searches):
    model = CHANGES["a branch"].make()
    model.tied = True
    guide = avi.FactorizedGuide(model, plate="data").setup(X)
    first = weigh(model, guide)
    expected = {plates: blocks.clone() for plates, blocks in first.blocks.items()}
    for blocks in first.blocks.values():
        blocks.add_(1)
    second = weigh(model, guide)
    assert len(searches) == 1 and all(torch.equal(second.blocks[plates], blocks) for plates, blocks in expected.items())


# --- the digest itself


def digest(function, *of_rows, others=()):
    with torch.no_grad(), ProgramDigest(of_rows, others) as program:
        function(*of_rows, *others)
    return program.digest()


def test_values_of_latents_do_not_count_and_the_order_of_operations_does():
    one, other = torch.randn(4), torch.randn(4)
    assert digest(lambda z: z.exp() + 1, one) == digest(lambda z: z.exp() + 1, other)
    assert digest(lambda z: z.exp() + 1, one) != digest(lambda z: (z + 1).exp(), one)
    assert digest(lambda z: z.exp() + 1, one) != digest(lambda z: z.exp() + 2, one)


def test_what_is_written_in_place_is_known():
    def write(z, weight):
        memory = torch.zeros(4)
        memory[1:3].copy_(z[:2])
        return memory * weight

    z = torch.ones(4)
    digests = [digest(write, z, others=[torch.tensor(value)]) for value in (0.0, 0.5, 0.7)]
    # The weight meets the latents in a tensor that was made without them.
    assert digests[0] != digests[1] == digests[2]


def test_a_tensor_at_the_place_of_a_freed_one_is_read():
    def function(z, content):
        freed = z + 1.0
        del freed
        # Not made by an operation of torch.
        return z + torch.frombuffer(bytearray(np.float32(content).tobytes()) * 4, dtype=torch.float32)

    seen = {digest(partial(function, content=content), torch.ones(4)) for content in range(20)}
    assert len(seen) == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.int64, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[:, :1].expand(2, 3),
        lambda x: x[:1, :1].expand(1, 1),
        lambda x: x[0, 0],
        lambda x: x[:0],
        lambda x: x.conj(),
    ],
)
def test_constants_of_any_kind_count_by_their_content(dtype, change):
    def of(content):
        constant = change(torch.tensor(content).reshape(2, 3).to(dtype))
        return digest(lambda z: torch.where(constant == 1, z, -z), torch.ones(()))

    same, other = [0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]
    assert of(same) == of(same) is not None
    assert (of(same) == of(other)) == (change(torch.zeros(2, 3)).numel() == 0)


def test_what_cannot_be_read_has_no_digest():
    assert digest(lambda z: z.to_sparse() * 2, torch.ones(4)) is None
    assert digest(lambda z: z.to("meta") * 2, torch.ones(4)) is None


class Scripted(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.exp() + z


def test_scripted_mapped_and_compiled_functions_have_one():
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(Scripted())
    for function in (scripted, torch.vmap(Scripted()), torch.compile(Scripted(), backend="eager")):
        one, other = (digest(function, torch.randn(4)) for _ in "12")
        assert one is not None and one == other != digest(lambda z: z.exp(), torch.randn(4))
