"""What ArviZ is given: the guide's draws by site and row, their log likelihoods and weights."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import arviz
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_avi as avi

X = torch.linspace(-2, 2, 6, dtype=torch.float64)


def model(x, index=None, size=6):
    theta = pyro.sample("theta", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size, subsample=index):
        z = pyro.sample("z", dist.Normal(theta.sum(), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def drawing(x):
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


GUIDES = {"ours": avi.ConstantGuide, "Pyro's": AutoNormal}


@pytest.mark.parametrize("kind", GUIDES)
def test_draws_likelihoods_and_weights_are_those_of_the_guide(kind):
    guide = GUIDES[kind](model)
    guide(X)
    data = avi.to_arviz(model, guide, X, num_samples=7)
    posterior, likelihood, stats = data["posterior"], data["log_likelihood"], data["sample_stats"]
    assert posterior["theta"].dims == ("chain", "draw", "theta_dim_0") and posterior["theta"].shape == (1, 7, 2)
    assert posterior["z"].dims == ("chain", "draw", "data") and posterior["z"].shape == (1, 7, 6)
    z = torch.as_tensor(posterior["z"].values)
    torch.testing.assert_close(torch.as_tensor(likelihood["x"].values), dist.Normal(z, 0.5).log_prob(X))
    assert torch.equal(torch.as_tensor(data["observed_data"]["x"].values), X)
    torch.manual_seed(0)
    weights = avi.log_weights(model, guide, X, num_samples=7, seed=0)
    torch.testing.assert_close(torch.as_tensor(stats["log_weight"].values)[0], weights.total)
    torch.testing.assert_close(torch.as_tensor(stats["local_log_weight"].values)[0], weights.local)


def test_rows_of_a_minibatch_keep_their_positions():
    index = torch.tensor([4, 1])
    guide = avi.ConstantGuide(model).setup(X)
    data = avi.to_arviz(model, guide, X[index], index, num_samples=2)
    assert data["posterior"]["z"].coords["data"].values.tolist() == [4, 1]
    # Unscaled: a row's likelihood is its own.
    z = torch.as_tensor(data["posterior"]["z"].values)
    expected = dist.Normal(z, 0.5).log_prob(X[index])
    torch.testing.assert_close(torch.as_tensor(data["log_likelihood"]["x"].values), expected)


def test_arviz_can_work_with_it():
    guide = avi.ConstantGuide(model).setup(X)
    data = avi.to_arviz(model, guide, X, num_samples=100)
    summary = arviz.summary(data, var_names=["z"], kind="stats")
    assert len(summary) == 6 and math.isfinite(summary["mean"].iloc[0])


def test_observations_are_drawn_again_from_the_latents_of_the_same_draw():
    index = torch.tensor([4, 1])
    guide = avi.ConstantGuide(model, init_scale=1.0).setup(X)
    data, without = (
        avi.to_arviz(model, guide, X[index], index, num_samples=400, posterior_predictive=drawn)
        for drawn in (True, False)
    )
    predictive, posterior = data["posterior_predictive"]["x"], data["posterior"]["z"]
    assert predictive.dims == posterior.dims == ("chain", "draw", "data")
    assert predictive.coords["data"].values.tolist() == [4, 1]
    # Latents, and what is made of them, are the same without.
    assert (without["posterior"]["z"].values == posterior.values).all() and "posterior_predictive" not in without
    noise = predictive.values[0] - posterior.values[0]
    assert (
        abs(noise.mean()) < 5 * 0.5 / len(noise.flatten()) ** 0.5
        and abs(noise.std() / 0.5 - 1) < 5 / (2 * len(noise.flatten())) ** 0.5
    )
    # The twin: latents of another draw.
    assert (predictive.values[0][1:] - posterior.values[0][:-1]).std() > 1.2 * 0.5


def test_arviz_can_check_the_model_by_them():
    guide = avi.ConstantGuide(model).setup(X)
    data = avi.to_arviz(model, guide, X, num_samples=100)
    with warnings.catch_warnings():
        # Its own calls of matplotlib are deprecated; and of a guide before its training the weights are what they are.
        warnings.simplefilter("ignore")
        plt.switch_backend("agg")
        axes = arviz.plot_ppc(data, num_pp_samples=5, show=False)
        plt.close(axes.figure)
        assert math.isfinite(arviz.loo(data).elpd_loo)


def test_a_model_of_factors_has_nothing_to_draw():
    def factors(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.factor("x", -((z - x) ** 2))

    guide = avi.ConstantGuide(factors, plate="data").setup(X)
    assert "posterior_predictive" not in avi.to_arviz(factors, guide, X, num_samples=2, plate="data")


def test_arviz_1_is_given_one_nested_dictionary(monkeypatch):
    calls = []
    monkeypatch.setattr(arviz, "__version__", "1.2.0")
    monkeypatch.setattr(arviz, "from_dict", lambda *args, **kwargs: calls.append((args, kwargs)) or "tree")
    assert avi.to_arviz(model, avi.ConstantGuide(model).setup(X), X, num_samples=3) == "tree"
    ((groups,), named) = calls[0]
    assert set(groups) == {"posterior", "posterior_predictive", "log_likelihood", "observed_data", "sample_stats"}
    assert set(named) == {"coords", "dims"} and groups["posterior"]["z"].shape == (1, 3, 6)
    assert named["dims"]["z"] == ["data"] and named["coords"]["data"] == list(range(6))


def test_the_program_is_left_as_it_is_and_the_seed_decides():
    guide = avi.ConstantGuide(model).setup(X)
    state = torch.get_rng_state()
    one, same, other = (
        avi.to_arviz(model, guide, X, num_samples=2, seed=s)["posterior"]["z"].values for s in (0, 0, 1)
    )
    assert (one == same).all() and not (one == other).all()
    assert torch.equal(state, torch.get_rng_state()) and not set(pyro.get_param_store())


def test_errors_say_what_to_do():
    guide = avi.ConstantGuide(model).setup(X)
    with pytest.raises(ValueError, match="Expected num_samples of at least 1, got 0"):
        avi.to_arviz(model, guide, X, num_samples=0)
    with pytest.raises(ValueError, match="Expected the same rows in every draw"):
        avi.to_arviz(drawing, avi.ConstantGuide(drawing), X, num_samples=9)


def test_who_makes_errors_of_warnings_can_export_on_any_day(tmp_path):
    """ArviZ 0.23 warns on the first import of a day, which it remembers in the user's cache."""
    code = """
import torch
import pyro_avi as avi
x = torch.rand(20, 1, 8, 8)
model = avi.models.VAE(avi.models.DenseDecoder(2, (4,), (1, 8, 8)), size=20)
guide = avi.ConstantGuide(model).setup(x)
assert set(avi.to_arviz(model, guide, x, num_samples=3)["posterior"].sizes) >= {"chain", "draw", "data"}
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).resolve().parents[2],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
