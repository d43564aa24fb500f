"""Guides in files: what is saved is what is loaded, and a wrong file, model or option is told apart."""

import json
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file
from torch import nn

import pyro_avi as avi
from tests.own_family import SkewedFamily

N = 6
X = torch.linspace(-1, 1, 3 * N).reshape(N, 3)


def model(x, index=None):
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(theta, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(z.shape[:-1] + (3,)), 1.0).to_event(1), obs=x)


def larger(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :3], 1.0).to_event(1), obs=x)


def crossed(x):
    persons, items = pyro.plate("persons", N, dim=-2), pyro.plate("items", 3, dim=-1)
    with persons:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with persons, items:
        pyro.sample("x", dist.Normal(ability - difficulty, 1.0), obs=x)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.sum(-1, keepdim=True)


def doubled(x, index=None):
    return 2 * x


GUIDES = {
    "constant": (lambda: avi.ConstantGuide(model, init_scale=0.3), {}),
    "amortized": (lambda: avi.AmortizedGuide(model, (5,)), {}),
    "factorized": (lambda: avi.FactorizedGuide(model), {}),
    "full covariance": (lambda: avi.FactorizedGuide(model, family=avi.MultivariateNormal()), {}),
    "low rank": (lambda: avi.AmortizedGuide(model, (5,), family=avi.LowRankNormal(rank=1)), {}),
    "flow": (lambda: avi.ConstantGuide(model, family=avi.Flow()), {}),
    "a family of the caller's own": (
        lambda: avi.FactorizedGuide(model, family=SkewedFamily()),
        {"family": SkewedFamily},
    ),
    "a family of the caller's own inside another": (
        lambda: avi.AmortizedGuide(model, (5,), family=avi.Conditional(SkewedFamily())),
        {"family": lambda: avi.Conditional(SkewedFamily())},
    ),
    "same rows": (lambda: avi.FactorizedGuide(model, same_rows=True), {}),
    "encoder and inputs": (
        lambda: avi.AmortizedGuide(model, Sum(), inputs=doubled),
        {"encoder": Sum, "inputs": lambda: doubled},
    ),
    "another guide of the globals": (
        lambda: avi.ConstantGuide(model, global_guide=AutoNormal),
        {"global_guide": lambda: AutoNormal},
    ),
    "crossed plates": (lambda: avi.AmortizedGuide(crossed, (5,), plate=("persons", "items")), {}),
}


def saved(name, folder):
    make, options = GUIDES[name]
    guide = make()
    guide.setup(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    path = folder / "guide.safetensors"
    avi.save(guide, path)
    return guide, path, {option: value() for option, value in options.items()}


def draws(guide):
    torch.manual_seed(1)
    return guide(X)


@pytest.mark.parametrize("at_once", [True, False], ids=["with arguments", "at the first call"])
@pytest.mark.parametrize("name", GUIDES)
def test_what_is_loaded_draws_what_was_saved(name, at_once, tmp_path):
    guide, path, options = saved(name, tmp_path)

    again = avi.load(path, guide.model, *((X,) if at_once else ()), **options)
    again.setup(X)

    assert type(again) is type(guide) and again.describe() == guide.describe()
    of_one, of_other = draws(guide), draws(again)
    assert all(torch.equal(of_one[site], of_other[site]) for site in of_one)
    assert set(of_one) == set(of_other)


def test_double_precision_is_kept(tmp_path):
    x = X.double()
    guide = avi.FactorizedGuide(larger).setup(x)
    guide.double()
    with torch.no_grad():
        guide.table.fill_(1 / 3)
    avi.save(guide, tmp_path / "guide")

    assert torch.equal(avi.load(tmp_path / "guide", larger, x).table, guide.table)


def test_a_guide_loaded_before_its_first_call_can_be_copied(tmp_path):
    guide, path, _ = saved("factorized", tmp_path)

    again = pickle.loads(pickle.dumps(avi.load(path, model)))

    assert torch.equal(again.setup(X).table, guide.table)


def test_a_file_is_replaced_at_once(tmp_path):
    _, path, _ = saved("constant", tmp_path)
    guide, path, _ = saved("amortized", tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert type(avi.load(path, model)) is type(guide)


def test_the_header_is_plain_json(tmp_path):
    from safetensors import safe_open

    _, path, _ = saved("low rank", tmp_path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pyro_avi"])

    assert header["class"] == "AmortizedGuide" and header["encoder"] == [5]
    assert header["family"] == {"class": "LowRankNormal", "settings": {"rank": 1}}
    assert set(header["versions"]) == {"pyro_avi", "torch", "pyro"}


# --- errors


def test_a_truncated_file_is_refused(tmp_path):
    _, path, _ = saved("factorized", tmp_path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="Expected a whole file written by avi.save"):
            avi.load(path, model)


def rewrite(path, **changes):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pyro_avi"])
    save_file(load_file(path), path, metadata={"pyro_avi": json.dumps({**header, **changes})})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": "os.system"}, "without a guide's header"),
        ({"format": 99}, "Expected format 1 .*, got 99"),
        ({"family": {"class": "Popen", "settings": {}}}, "Expected a family of .*, got 'Popen'"),
    ],
)
def test_a_file_names_no_code(change, message, tmp_path):
    _, path, _ = saved("constant", tmp_path)
    rewrite(path, **change)

    with pytest.raises(ValueError, match=message):
        avi.load(path, model)


def test_other_safetensors_files_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "other")

    with pytest.raises(ValueError, match="a safetensors file without a guide's header"):
        avi.load(tmp_path / "other", model)


REFUSED = {
    "wrong model": (
        "amortized",
        lambda path: avi.load(path, larger, X),
        r"has global_latents = \{'theta': \[2\]\}, got \{\}",
    ),
    "wrong N": ("factorized", lambda path: avi.load(path, model, X[:4]), r"has sizes = \[\[6\]\], got \[\[4\]\]"),
    "wrong N at the first call": ("factorized", lambda path: avi.load(path, model)(X[:4]), r"has sizes = \[\[6\]\]"),
    "no encoder": (
        "encoder and inputs",
        lambda path: avi.load(path, model, inputs=doubled),
        r"Expected encoder= .*Sum, got none",
    ),
    "no family": (
        "a family of the caller's own",
        lambda path: avi.load(path, model),
        "Expected a family of .*got 'tests.own_family.SkewedFamily'.*pass the same family=",
    ),
    "another family": (
        "a family of the caller's own",
        lambda path: avi.load(path, model, family=avi.DiagonalNormal()),
        r"Expected family= as described at .*SkewedFamily.*, got DiagonalNormal\(\)",
    ),
    "no inputs": (
        "encoder and inputs",
        lambda path: avi.load(path, model, encoder=Sum()),
        "Expected inputs= .*doubled, got none",
    ),
    "no guide of the globals": (
        "another guide of the globals",
        lambda path: avi.load(path, model),
        "AutoNormal, got none",
    ),
    "needless inputs": (
        "amortized",
        lambda path: avi.load(path, model, inputs=doubled),
        "Expected inputs=None .*made without one, got",
    ),
    "other widths": (
        "amortized",
        lambda path: avi.load(path, model, encoder=(6,)),
        r"Expected encoder=\[5\] .*made with \[5\], got \[6\]",
    ),
    "an encoder of another kind": (
        "amortized",
        lambda path: avi.load(path, model, encoder=Sum()),
        r"Expected encoder=\[5\] .*made with \[5\], got Sum",
    ),
}


@pytest.mark.parametrize("name", ["amortized", "encoder and inputs"])
def test_a_guide_is_loaded_with_the_encoder_that_it_was_made_with(name, tmp_path):
    guide, path, options = saved(name, tmp_path)
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    after = {key: value.clone() for key, value in guide.state_dict().items()}

    for encoder in [guide.encoder] + [(5,), [5]] * (name == "amortized"):
        again = avi.load(path, model, X, **{**options, "encoder": encoder})
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in before.items())
    # What was trained since is untouched.
    assert all(torch.equal(value, guide.state_dict()[key]) for key, value in after.items())


@pytest.mark.parametrize("name", ["amortized", "factorized"])
def test_a_failed_first_call_does_not_lose_what_was_loaded(name, tmp_path):
    guide, path, options = saved(name, tmp_path)
    again = avi.load(path, model, **options)
    with pytest.raises((ValueError, RuntimeError)):
        again(X[:4] if name == "factorized" else X[:, :2])
    again(X)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in guide.state_dict().items())


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    name, call, message = REFUSED[case]
    _, path, _ = saved(name, tmp_path)

    with pytest.raises(ValueError, match=f"(?s){message}"):
        call(path)


def test_only_guides_that_have_been_set_up_are_saved(tmp_path):
    with pytest.raises(ValueError, match="guide.setup"):
        avi.save(avi.ConstantGuide(model), tmp_path / "guide")
    with pytest.raises(TypeError, match="one of AmortizedGuide, ConstantGuide, Factorized.*, got AutoNormal"):
        avi.save(AutoNormal(model), tmp_path / "guide")
    with pytest.raises(FileNotFoundError, match="found none at"):
        avi.load(tmp_path / "none", model)
    assert not list(tmp_path.iterdir())


class Widening(SkewedFamily):
    def settings(self):
        return {"by": torch.ones(())}


def test_a_family_whose_settings_are_no_plain_data_is_not_saved(tmp_path):
    guide = avi.ConstantGuide(model, family=Widening()).setup(X)
    with pytest.raises(
        TypeError, match=r"Expected settings\(\) of family tests.test_storage.Widening to be plain data"
    ):
        avi.save(guide, tmp_path / "guide")
    assert not list(tmp_path.iterdir())


# --- files that declare more than they hold: they are refused before memory is taken for it

HUGE = 10**9
DECLARED = {
    "rank": ("low rank", {"family": {"class": "LowRankNormal", "settings": {"rank": HUGE}}}),
    "widths of a flow": (
        "flow",
        {"family": {"class": "Flow", "settings": {"transforms": 2, "hidden": [HUGE], "context": 8, "bins": 8}}},
    ),
    "transforms": ("flow", {"family": {"class": "Flow", "settings": {"transforms": HUGE, "hidden": [1]}}}),
    "context": ("flow", {"family": {"class": "Flow", "settings": {"hidden": [1], "context": HUGE}}}),
    "a flow of each row": ("factorized", {"family": {"class": "RowFlow", "settings": {"hidden": HUGE}}}),
    "knots": ("factorized", {"family": {"class": "RowFlow", "settings": {"hidden": 2, "bins": HUGE}}}),
    "a family in a family": (
        "constant",
        {
            "family": {
                "class": "Conditional",
                "settings": {"family": {"class": "LowRankNormal", "settings": {"rank": HUGE}}},
            }
        },
    ),
    "widths": ("amortized", {"encoder": [HUGE]}),
    "a window": ("amortized", {"inputs": [HUGE, 0], "reads": [[HUGE, 0]]}),
    "many widths": ("amortized", {"encoder": [40, 40, 40]}),
    "covariance": ("factorized", {"family": {"class": "MultivariateNormal", "settings": {}}}),
}


@pytest.mark.parametrize("case", DECLARED)
def test_declared_sizes_are_compared_with_the_file(case, tmp_path):
    name, changes = DECLARED[case]
    _, path, _ = saved(name, tmp_path)
    rewrite(path, **changes)
    with pytest.raises(
        ValueError, match="Expected a file with the [0-9,]+ numbers of .*one that holds [0-9,]+ for them"
    ):
        avi.load(path, model, X)


@pytest.mark.parametrize("latents", [1, 2, 7])
@pytest.mark.parametrize("transforms", [1, 3])
@pytest.mark.parametrize("hidden", [(1,), (5, 3), (2, 4, 6)])
def test_what_a_flow_shares_is_counted_without_making_it(latents, transforms, hidden):
    flow = avi.Flow(transforms=transforms, hidden=hidden, context=3, bins=4)
    counted = flow.num_shared(latents)
    flow.prepare(latents)
    assert counted == sum(parameter.numel() for parameter in flow.parameters())


@pytest.mark.parametrize("latents", [1, 2, 3, 10, 24])
@pytest.mark.parametrize("hidden", [1, 2, 6, 25])
def test_what_a_flow_of_each_row_has_is_counted_without_its_units(latents, hidden):
    flow = avi.RowFlow(hidden=hidden, bins=3)
    reads = flow._reads(latents)
    knots = 3 * 3 - 1
    per_transform = sum(r + 1 + (latents - r) * knots for r in reads) + latents * knots
    assert flow.num_parameters(latents) == 2 * latents + 2 * per_transform


KINDS = {
    "plate": 3,
    "family": "DiagonalNormal",
    "init_scale": "0.1",
    "dtype": "save",
    "global_latents": {"theta": "2"},
    "row_sets": [{"plates": ["data"]}],
    "encoder": [5.0],
    "inputs": 1,
    "standardize": "yes",
    "covariates": [[{"argument": "x"}]],
    "reads": [[1, 2, 3]],
    "reads_globals": "all",
    "sizes": [6],
    "rows_on": "cuda",
}


@pytest.mark.parametrize("part", KINDS)
def test_parts_of_another_kind_are_refused(part, tmp_path):
    _, path, _ = saved("factorized" if part in ("sizes", "rows_on") else "amortized", tmp_path)
    rewrite(path, **{part: KINDS[part]})
    with pytest.raises(ValueError, match=f"(?s)got a damaged one: .* to have a {part} of a guide, got"):
        avi.load(path, model, X)


@pytest.mark.parametrize(
    "family",
    [
        {"class": "LowRankNormal", "settings": {"rank": 0}},
        {"class": "LowRankNormal", "settings": {"rank": "2"}},
        {"class": "DiagonalNormal", "settings": {"rank": 2}},
        {"class": "Conditional", "settings": {"family": {"class": "DiagonalNormal", "settings": [3]}}},
    ],
)
def test_settings_that_make_no_family_are_refused(family, tmp_path):
    _, path, _ = saved("constant", tmp_path)
    rewrite(path, family=family)
    with pytest.raises(ValueError, match="Expected settings of .* at"):
        avi.load(path, model, X)


def test_parameters_of_other_shapes_are_refused(tmp_path):
    from safetensors import safe_open

    _, path, _ = saved("constant", tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = {"pyro_avi": file.metadata()["pyro_avi"]}
    tensors = load_file(path)
    for changed in (
        {name: x.repeat(2) if x.dim() == 1 else x for name, x in tensors.items()},
        {"other": torch.ones(90)},
    ):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(ValueError, match="Expected (the parameters of the guide|a file with)"):
            avi.load(path, model, X)
