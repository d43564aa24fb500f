"""What an amortized guide's encoder reads: standardized values, masks, covariates; never indices."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_avi as avi
from pyro_avi.encoder_inputs.standardize import Standardize, transform_of
from tests.marks import needs_compiler

N = 6


def read(guide, *args, **kwargs):
    """What the encoder of a guide reads."""
    inputs = []
    with torch.no_grad():
        handle = guide.encoder.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        guide.variational_parameters(*args, **kwargs)
    handle.remove()
    return inputs[0]


def rows(x, fn=lambda z: dist.Normal(z, 1.0)):
    """A latent and a value a row."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", fn(z), obs=x)


# --- statistics


def test_features_of_several_units_get_a_location_and_a_scale_each():
    x = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([5.0, 0.0, -1e6])

    got = Standardize(x, transform="none")(x)

    assert torch.allclose(got, (x - x.mean(0)) / x.std(0, correction=0), rtol=1e-9)


def test_counts_get_logarithms_one_scale_and_keep_rare_features_small():
    x = torch.poisson(torch.tensor([1e4, 3.0, 0.0]).expand(1000, 3))
    x[0, 2] = 1.0
    logs = x.log1p()

    got = Standardize(x, transform="log1p")(x)

    common = logs.var(0, correction=0).mean().sqrt()
    assert torch.allclose(got, (logs - logs.mean(0)) / common, atol=1e-5)
    assert got.abs().max() < 10 < ((logs - logs.mean(0)) / logs.std(0)).abs().max()


def test_images_have_one_location_and_scale():
    x = torch.rand(50, 2, 4, 4)
    x[..., 0] = 0.0

    standardize = Standardize(x, transform="none")

    assert standardize.location.shape == standardize.scale.shape == ()
    assert torch.allclose(standardize(x), (x - x.mean()) / x.std(correction=0), atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [torch.full((5, 2), 7.0), torch.zeros(5, 2), torch.tensor([[1e6, 3.0]]), torch.tensor([[2.0, 1.0], [2.0, 5.0]])],
    ids=["equal", "zero", "one row", "one constant feature"],
)
@pytest.mark.parametrize("transform", ["none", "log1p", "log", "shared"])
def test_values_that_do_not_vary_are_harmless(x, transform):
    standardize = Standardize(x, transform=transform)

    assert (standardize.scale > 0).all() and standardize.scale.isfinite().all()
    assert standardize(x).abs().max() <= 2 and standardize(2 * x + 1).abs().max() < 100


def test_a_nearly_constant_feature_is_not_blown_up_to_its_rounding():
    x = torch.stack([torch.tensor(1e6) + torch.tensor([0.0, 0.0625] * 3), torch.randn(N)], -1)

    assert Standardize(x, transform="none")(x)[:, 0].abs().max() < 0.2


def test_what_is_not_known_has_no_part_and_becomes_zero():
    x, known = torch.randn(20, 3), torch.rand(20, 3) < 0.6
    known[:, 2] = False
    hidden = torch.where(known, x, torch.nan)

    standardize = Standardize(hidden, known, transform="none")
    got = standardize(hidden, known)

    of_first = x[known[:, 0], 0]
    assert torch.allclose(standardize.location[0], of_first.mean()) and standardize.scale.isfinite().all()
    assert torch.allclose(standardize.scale[0], of_first.std(correction=0))
    assert (got[~known] == 0).all() and got.isfinite().all()


SUPPORTS = {
    "Poisson": (dist.Poisson(torch.ones(N)), torch.ones(N), "log1p"),
    "independent": (dist.Poisson(torch.ones(N, 2)).to_event(1), torch.ones(N, 2), "log1p"),
    "NegativeBinomial": (dist.NegativeBinomial(3.0, torch.ones(N) / 2), torch.ones(N), "log1p"),
    "GammaPoisson": (dist.GammaPoisson(torch.ones(N), 1.0), torch.ones(N), "log1p"),
    "ZeroInflatedPoisson": (dist.ZeroInflatedPoisson(torch.ones(N), gate=torch.tensor(0.5)), torch.ones(N), "log1p"),
    "Multinomial": (dist.Multinomial(3, torch.ones(N, 2)), torch.ones(N, 2), "log1p"),
    "Binomial": (dist.Binomial(3, torch.ones(N) / 2), torch.ones(N), "shared"),
    "Bernoulli": (dist.Bernoulli(torch.ones(N) / 2), torch.ones(N), "shared"),
    "Beta": (dist.Beta(torch.ones(N), 1.0), torch.ones(N) / 2, "shared"),
    "Categorical": (dist.Categorical(torch.ones(N, 3)), torch.ones(N).long(), "shared"),
    "LogNormal": (dist.LogNormal(torch.zeros(N), 1.0), torch.ones(N), "log"),
    "Normal": (dist.Normal(torch.zeros(N), 1.0), torch.ones(N), "none"),
    "Normal of whole numbers": (dist.Normal(torch.zeros(N), 1.0), torch.ones(N).long(), "log1p"),
    "bytes": (dist.Normal(torch.zeros(N), 1.0), torch.ones(N).byte(), "shared"),
}


@pytest.mark.parametrize("case", SUPPORTS)
def test_what_kind_of_numbers_is_told_by_their_support_then_by_their_type(case):
    fn, values, expected = SUPPORTS[case]

    assert transform_of(values, fn.support) == expected

    def model(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", fn, obs=x)

    with pyro.validation_enabled(False):
        guide = avi.AmortizedGuide(model, (4,)).setup(values)
    assert [each.transform for each in guide.row_factors[0].function.standardize] == [expected]


# --- guides


def test_a_guide_reads_standardized_values_fixed_by_its_first_rows():
    x = 1000 + 50 * torch.randn(200)
    guide = avi.AmortizedGuide(rows, (4,)).setup(x)

    got = read(guide, x)
    assert torch.allclose(got, (x - x.mean()) / x.std(correction=0), atol=1e-3)
    assert torch.equal(read(guide, x[:3]), got[:3])
    later = read(guide, x + 500)
    assert later.mean() > 5 and torch.equal(read(guide, x), got)


@pytest.mark.parametrize(
    ("options", "standardized"),
    [
        ({}, True),
        ({"standardize": True}, True),
        ({"standardize": False}, False),
        ({"encoder": nn.Identity()}, False),
        ({"encoder": nn.Identity(), "standardize": True}, True),
        ({"inputs": lambda x: x[:, None]}, False),
        ({"inputs": lambda x: x[:, None], "standardize": True}, True),
    ],
)
def test_what_is_standardized(options, standardized):
    x = 1000 + 50 * torch.randn(200)
    if isinstance(options.get("encoder"), nn.Identity):
        x = x[:, None]
    model = rows if x.dim() == 1 else lambda x: rows(x, lambda z: dist.Normal(z[:, None], 1.0).to_event(1))
    guide = avi.AmortizedGuide(model, **options).setup(x)

    got, state = read(guide, x).flatten(), [name for name in guide.state_dict() if "standardize" in name]

    expected = (x - x.mean()) / x.std(correction=0) if standardized else x
    assert torch.allclose(got, expected.flatten(), atol=1e-3)
    assert len(state) == (2 if standardized else 0)
    assert not any("standardize" in name for name, _ in guide.named_parameters())


def test_statistics_live_with_the_guide(tmp_path):
    x = 1000 + 50 * torch.randn(200)
    guide = avi.AmortizedGuide(rows, (4,)).setup(x)
    with torch.no_grad():
        guide.head.weight.normal_()
    expected, other = guide.variational_parameters(x), torch.zeros(3)

    avi.save(guide, tmp_path / "guide")
    loaded = avi.AmortizedGuide(rows, (4,)).setup(other)
    loaded.load_state_dict(guide.state_dict())
    pending = avi.AmortizedGuide(rows, (4,))
    pending.load_state_dict(guide.state_dict())
    copies = [loaded, pending.setup(other), copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))]
    copies += [avi.load(tmp_path / "guide", rows), avi.load(tmp_path / "guide", rows, other)]

    assert all(torch.equal(each.variational_parameters(x), expected) for each in copies)
    assert guide.double().variational_parameters(x.double()).dtype == torch.float64


def test_files_from_before_are_read_as_they_were_made(tmp_path, monkeypatch):
    x = 1000 + 50 * torch.randn(20)
    guide = avi.AmortizedGuide(rows, (4,), standardize=False).setup(x)
    described = guide.describe()
    del described["standardize"], described["covariates"]
    monkeypatch.setattr(guide, "describe", lambda: described)
    avi.save(guide, tmp_path / "guide")

    for again in (avi.load(tmp_path / "guide", rows), avi.load(tmp_path / "guide", rows, x)):
        assert torch.equal(again.variational_parameters(x), guide.variational_parameters(x))


@pytest.mark.parametrize("where", ["outside", "inside", "poutine"])
def test_a_mask_reaches_the_encoder_in_any_form(where):
    x, known = torch.randn(N, 3), torch.rand(N, 3) < 0.5
    known[0] = False
    if where == "poutine":
        known = known[:, :1].expand(N, 3)

    def model(x, known):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            if where == "poutine":
                with poutine.mask(mask=known[:, 0]):
                    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
            elif where == "inside":
                pyro.sample("x", dist.Normal(z, 1.0).mask(known).to_event(1), obs=x)
            else:
                whole = known.all(-1)
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1).mask(whole), obs=x)

    if where == "outside":
        known = known.all(-1, keepdim=True).expand(N, 3)
    hidden = torch.where(known, x, 1e30)
    got = read(avi.AmortizedGuide(model, (4,)).setup(hidden, known), hidden, known)

    assert got.shape == (N, 6) and torch.equal(got[:, 3:], known.float())
    assert (got[:, :3][~known] == 0).all() and got.abs().max() < 10


def test_labels_that_some_rows_lack_are_read_as_zeros_beside_their_mask():
    x, y = torch.randn(N), torch.tensor([1.0, torch.nan, 3.0, 2.0, torch.nan, 1.0])

    def model(x, y):
        there = ~y.isnan()
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0).mask(there), obs=y)

    with pyro.validation_enabled(False):
        guide = avi.AmortizedGuide(model, (4,)).setup(x, y)
        got = read(guide, x, y)

    assert torch.equal(got[:, 2], (~y.isnan()).float())
    assert (got[y.isnan(), 1] == 0).all() and got.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_missing_values_without_a_mask_are_named(bad):
    x = torch.randn(N)
    x[[1, 4]] = bad

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"'x'.*2 of 6 rows.*nan or infinite"):
        avi.AmortizedGuide(rows, (4,)).setup(x)
    guide = avi.AmortizedGuide(rows, (4,)).setup(torch.randn(N))
    with pytest.raises(ValueError, match=r"'x'.*2 of 6 rows.*nan or infinite"):
        guide(x)


# --- covariates


def poisson(y, exposure=1.0):
    with pyro.plate("data", len(y)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        pyro.sample("y", dist.Poisson(exposure * rate), obs=y)


def regression(y, x, group, index=None):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    effect = pyro.sample("effect", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", 2 * N, subsample=index) as rows:
        z = pyro.sample("z", dist.Normal(x[rows] @ slope + effect[group[rows]], 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def names(guide):
    (reads,) = guide.describe()["covariates"]
    return [each["argument"] for each in reads]


def test_an_exposure_is_read_by_its_logarithm():
    y, exposure = torch.poisson(torch.ones(N)), torch.logspace(-2, 3, N)
    guide = avi.AmortizedGuide(poisson, (4,)).setup(y, exposure)

    assert names(guide) == ["exposure"]
    got = read(guide, y, exposure)
    logs = exposure.log()
    assert torch.allclose(got[:, 1], (logs - logs.mean()) / logs.std(correction=0), atol=1e-5)
    assert torch.equal(read(guide, y=y[:2], exposure=exposure[:2]), got[:2])
    with pytest.raises(ValueError, match="argument exposure of the model as a tensor"):
        read(guide, y)


def test_covariates_are_read_at_the_rows_of_a_call_and_indices_are_not():
    y, x, group = torch.randn(2 * N), torch.randn(2 * N, 3), torch.arange(2 * N) % 2
    guide = avi.AmortizedGuide(regression, (4,)).setup(y, x, group)
    some = torch.tensor([7, 0, 3])
    permuted = torch.randperm(2 * N)

    assert names(guide) == ["x"]
    everything = read(guide, y, x, group)
    assert everything.shape == (2 * N, 4)
    assert torch.equal(read(guide, y[some], x, group, some), everything[some])
    later = avi.AmortizedGuide(regression, (4,)).setup(y[permuted], x, group, permuted)
    assert names(later) == ["x"]
    assert torch.allclose(read(later, y[permuted], x, group, permuted), everything[permuted], atol=1e-5)


def test_covariates_where_the_model_draws_its_rows():
    def model(y, exposure):
        with pyro.plate("data", 2 * N, subsample_size=3) as rows:
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Poisson(exposure[rows] * rate), obs=y[rows])

    y, exposure = torch.poisson(torch.ones(2 * N)), torch.logspace(-2, 3, 2 * N)
    guide = avi.AmortizedGuide(model, (4,)).setup(y, exposure)

    assert names(guide) == ["exposure"] and read(guide, y, exposure).shape == (2 * N, 2)
    assert guide(y, exposure)["rate"].shape == (3,)


def of_numpy(y, exposure):
    poisson(y, torch.as_tensor(exposure.numpy().copy()))


def nested(y, exposure):
    poisson(y, exposure["of"][0])


def in_prior(y, exposure):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(exposure, 1.0))
        pyro.sample("y", dist.Poisson(1.0).expand([len(y)]), obs=y)


def weights(y, exposure):
    with pyro.plate("data", len(y)), poutine.scale(scale=exposure):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson(z.exp()), obs=y)


def transposed(y, exposure):
    poisson(y, exposure[0])


USES = {
    "numpy": (of_numpy, lambda e: e, "exposure", N),
    "nested": (nested, lambda e: {"of": [e]}, "exposure['of'][0]", N),
    "prior": (in_prior, lambda e: e, "exposure", N),
    "weights": (weights, lambda e: e, "exposure", N),
    "transposed": (transposed, lambda e: torch.stack([e, e]), "exposure", 2 * N),
}


@pytest.mark.filterwarnings("ignore:The rows and observed values:UserWarning")
@pytest.mark.parametrize("use", USES)
def test_any_use_of_an_argument_is_seen(use):
    model, wrap, name, numel = USES[use]
    y, exposure = torch.poisson(torch.ones(N)), torch.logspace(-2, 3, N)

    guide = avi.AmortizedGuide(model, (4,)).setup(y, wrap(exposure))

    assert names(guide) == [name]
    assert read(guide, y, wrap(exposure)).numel() == N + numel


def shared_vector(y, extra):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(extra)), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ extra, 1.0), obs=y)


def unused(y, extra):
    rows(y)


def one_hot(y, extra):
    effect = pyro.sample("effect", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    kinds = torch.nn.functional.one_hot(extra, 3).float()
    rows(y, lambda z: dist.Normal(z + kinds @ effect, 1.0))


def compared(y, extra):
    rows(y, lambda z: dist.Normal(torch.where(extra == 1, z, -z), 1.0))


def autoregressive(y, extra):
    del extra
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        before = torch.cat([torch.zeros(len(y), 1), y[:, :-1]], -1)
        pyro.sample("y", dist.Normal(before + z[:, None], 1.0).to_event(1), obs=2 * y)


KINDS = torch.arange(N) % 3
NOT_READ = {
    "a vector as long as there are rows": (shared_vector, torch.randn(N), torch.randn(N)),
    "not used": (unused, torch.randn(N), torch.randn(N)),
    "one-hot": (one_hot, torch.randn(N), KINDS),
    "compared": (compared, torch.randn(N), KINDS),
    "what is observed": (autoregressive, torch.randn(N, 2), None),
}


@pytest.mark.parametrize("case", NOT_READ)
def test_what_is_no_covariate(case):
    model, y, extra = NOT_READ[case]

    assert names(avi.AmortizedGuide(model, (4,)).setup(y, extra)) == []


def test_whole_numbers_that_are_calculated_with_are_covariates():
    def model(y, age):
        rows(y, lambda z: dist.Normal(z * age, 1.0))

    guide = avi.AmortizedGuide(model, (4,)).setup(torch.randn(N), torch.arange(N) + 20)

    assert names(guide) == ["age"] and guide.describe()["covariates"][0][0]["transform"] == "log1p"


def test_covariates_of_one_of_two_crossed_plates():
    def model(y, of_users, of_items):
        with pyro.plate("users", 4, dim=-2), pyro.plate("items", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(of_users[:, None] + of_items, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y, of_users, of_items = torch.randn(4, 3), torch.randn(4), torch.randn(3)
    guide = avi.AmortizedGuide(model, (4,), plate=("users", "items"), standardize=False).setup(y, of_users, of_items)

    got = read(guide, y, of_users, of_items).view(4, 3, 3)
    assert torch.equal(got, torch.stack([y, of_users[:, None].expand(4, 3), of_items.expand(4, 3)], -1))


def test_a_module_of_ones_own_reads_what_is_observed_and_a_warning_names_the_rest():
    y, exposure = torch.poisson(torch.ones(N, 1)), torch.logspace(-2, 3, N)[:, None]

    def model(y, exposure):
        with pyro.plate("data", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
            pyro.sample("y", dist.Poisson(exposure * rate[:, None]).to_event(1), obs=y)

    with pytest.warns(UserWarning, match=r"(?s)argument exposure of the model.*inputs=lambda y, exposure: "):
        guide = avi.AmortizedGuide(model, nn.Linear(1, 4)).setup(y, exposure)
    assert torch.equal(read(guide, y, exposure), y)
    avi.AmortizedGuide(model, nn.Linear(2, 4), inputs=lambda y, e: torch.cat([y, e], -1)).setup(y, exposure)


def test_an_argument_that_cannot_be_told_is_named():
    y, exposure = torch.poisson(torch.ones(N)), torch.logspace(-2, 3, N)

    def model(y, exposure):
        if not (exposure.diff() > 0).all():
            raise RuntimeError("not sorted")
        poisson(y, exposure)

    with (
        pytest.warns(UserWarning, match="could not be traced"),
        pytest.warns(UserWarning, match="argument exposure .*RuntimeError: not sorted"),
    ):
        avi.AmortizedGuide(model, (4,)).setup(y, exposure)
    with pytest.warns(UserWarning, match="argument exposure .*one row does not tell"):
        avi.AmortizedGuide(poisson, (4,)).setup(y[:1], exposure[:1])


def test_a_model_that_stands_few_values_of_its_latents_is_set_up_all_the_same():
    def model(y, exposure):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.tensor(5.0), 0.01))
            if (z < 4).any():
                raise RuntimeError("too far")
            pyro.sample("y", dist.Poisson(exposure * z), obs=y)

    guide = avi.AmortizedGuide(model, (4,), init_loc_fn=lambda site: torch.full((N,), 5.0))
    with pytest.warns(UserWarning, match="argument exposure .*at other latents the model raises RuntimeError: too far"):
        guide.setup(torch.ones(N), torch.logspace(-2, 3, N))


def test_covariates_live_with_the_guide(tmp_path):
    y, exposure = torch.poisson(torch.ones(N)), torch.logspace(-2, 3, N)
    guide = avi.AmortizedGuide(poisson, (4,)).setup(y, exposure)
    with torch.no_grad():
        guide.head.weight.normal_()
    avi.save(guide, tmp_path / "guide")
    copies = [copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), avi.load(tmp_path / "guide", poisson)]
    # One row does not tell what its covariates are; the file does.
    copies += [avi.load(tmp_path / "guide", poisson, y[:1], exposure[:1])]

    expected = guide.variational_parameters(y, exposure)
    assert all(torch.equal(each.variational_parameters(y, exposure), expected) for each in copies)


@needs_compiler
def test_compiled_training_reads_the_same():
    y, exposure = torch.poisson(torch.ones(N)), torch.logspace(-2, 3, N)

    def losses(**options):
        torch.manual_seed(0)
        guide = avi.AmortizedGuide(poisson, (4,))
        return avi.fit(poisson, guide, y, exposure, num_steps=5, lr=0.01, progress=False, **options).losses

    assert torch.allclose(losses(compile=True), losses(compile=False), rtol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_replicas_keep_their_own_statistics():
    x = 100 + 30 * torch.randn(4 * N)
    options = {"num_steps": 4, "lr": 0.01, "progress": False}

    def replica(seed):
        torch.manual_seed(seed)
        model = avi.models.BayesianDecoder(avi.models.DenseDecoder(2, (4,), (1,)), size=4 * N)
        return model, avi.AmortizedGuide(model, (4,))

    def batches(seed):
        return avi.minibatches(x[:, None], batch_size=N, seed=seed)

    together = avi.fit_many(
        [replica(seed) for seed in range(2)], batches=[batches(seed) for seed in range(2)], seed=[0, 1], **options
    )
    for seed, fit in enumerate(together):
        alone = avi.fit(*replica(seed), batches=batches(seed), seed=seed, compile=True, **options)
        assert torch.allclose(fit.losses, alone.losses, rtol=1e-4)


# --- training


def exposures():
    exposure = (2 * torch.randn(100) + 3).exp()
    y = torch.poisson(exposure * torch._standard_gamma(torch.full((100,), 2.0)) / 2)
    # Summed out, a rate leaves a negative binomial.
    evidence = dist.NegativeBinomial(2.0, logits=(exposure / 2).log()).log_prob(y).sum()
    return poisson, (y, exposure), evidence


def test_the_evidence_of_exposures_is_that_of_the_model():
    model, (y, exposure), evidence = exposures()
    rates = torch._standard_gamma(torch.full((20_000, 100), 2.0)) / 2

    by_draws = dist.Poisson(exposure * rates).log_prob(y).logsumexp(0) - math.log(len(rates))

    assert torch.isclose(by_draws.sum(), evidence, rtol=0.02)


@pytest.mark.slow
def test_with_its_exposure_a_rate_is_inferred_and_without_it_is_not():
    model, args, evidence = exposures()

    def gap(guide):
        torch.manual_seed(0)
        avi.fit(model, guide, *args, num_steps=1000, lr=1e-2, progress=False)
        return float(evidence - avi.elbo(avi.log_weights(model, guide, *args, num_samples=200, seed=0)).value)

    with_it, of_table = gap(avi.AmortizedGuide(model)), gap(avi.FactorizedGuide(model))
    without = gap(avi.AmortizedGuide(model, inputs=lambda y, exposure: y.log1p()[:, None]))
    assert of_table > 0 and with_it < of_table + 50 and without > of_table + 500


def generalized():
    x, offset = torch.randn(100, 3), 4 * torch.rand(100)
    y = torch.poisson((x @ torch.tensor([1.0, -0.7, 0.4]) + offset + 0.5 * torch.randn(100)).exp())

    def model(y, x, offset):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", 100):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Poisson((x @ slope + offset + z).exp()), obs=y)

    return model, (y, x, offset)


def sparse_counts():
    loadings, level = torch.randn(2, 20), torch.linspace(-4, 7.5, 20)
    rates = (torch.randn(100, 2) @ loadings + level).exp() * torch._standard_gamma(torch.full((100, 20), 2.0)) / 2

    def model(y):
        loadings = pyro.sample("loadings", dist.Normal(torch.zeros(2, 20), 1.0).to_event(2))
        level = pyro.sample("level", dist.Normal(torch.zeros(20), 5.0).to_event(1))
        with pyro.plate("cells", 100):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z @ loadings + level - math.log(2.0)
            pyro.sample("y", dist.NegativeBinomial(2.0, logits=logits).to_event(1), obs=y)

    return model, (torch.poisson(rates),)


@pytest.mark.slow
@pytest.mark.parametrize("make", [generalized, sparse_counts])
def test_raw_counts_train_where_they_diverged(make):
    model, args = make()

    def bound(**options):
        torch.manual_seed(0)
        guide = avi.AmortizedGuide(model, **options)
        try:
            avi.fit(model, guide, *args, num_steps=500, lr=1e-2, progress=False)
        except avi.DivergedError:
            return -math.inf
        return avi.elbo(avi.log_weights(model, guide, *args, num_samples=100)).value

    standardized = bound()
    assert math.isfinite(standardized) and standardized > bound(standardize=False) + 100
