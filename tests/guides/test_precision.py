"""Guides in the precision of the model's densities, whatever its latents are."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_avi as avi
from tests.all_guides import SMALL_GUIDES as GUIDES
from tests.all_guides import takes
from tests.families.test_families import FAMILIES

N = 6

# Of one row, by the precision of their densities.
LATENTS = {
    "real": lambda like: dist.Normal(like.new_zeros(2), 1.0).to_event(1),
    "positive": lambda like: dist.Gamma(like.new_full((2,), 2.0), 1.0).to_event(1),
    "categorical": lambda like: dist.Categorical(logits=like.new_zeros(2)),
    "one-hot": lambda like: dist.OneHotCategorical(logits=like.new_zeros(2)),
    "bits": lambda like: dist.Bernoulli(like.new_full((2,), 0.5)).to_event(1),
}
SETS = [("real",), ("positive",), ("categorical",), ("one-hot",), ("bits",), ("categorical", "real"), ("real", "bits")]


def model_of(latents):
    def model(x):
        with pyro.plate("data", len(x)):
            values = [pyro.sample(name, LATENTS[name](x)) for name in latents]
            loc = sum(value.reshape(*x.shape, -1).sum(-1) for value in values)
            pyro.sample("x", dist.Normal(loc.to(x), 1.0), obs=x)

    return model


def check(model, guide, x):
    fit = avi.fit(model, guide, x, num_steps=2, compile=False, progress=False)
    assert fit.losses.isfinite().all()
    assert {parameter.dtype for parameter in guide.parameters()} == {x.dtype}
    floats = [value.dtype for value in guide(x).values() if value.is_floating_point()]
    assert set(floats) <= {x.dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind, latents",
    [
        pytest.param(kind, latents, id=f"{kind}-{' and '.join(latents)}")
        for kind in GUIDES
        for latents in SETS
        if takes(kind, discrete=not {"real", "positive"} >= set(latents))
    ],
)
def test_a_guide_has_the_precision_of_the_models_densities(kind, latents, dtype):
    model, x = model_of(latents), torch.linspace(-1, 1, N, dtype=dtype)
    check(model, GUIDES[kind](model), x)


@pytest.mark.parametrize("latents", [("real",), ("categorical", "real")], ids=" and ".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_has_every_family(family, latents):
    model, x = model_of(latents), torch.linspace(-1, 1, N, dtype=torch.float64)
    check(model, avi.AmortizedGuide(model, encoder=(4,), family=FAMILIES[family]()), x)


@pytest.mark.parametrize("latents", [("real",), ("categorical",)], ids=" and ".join)
@pytest.mark.parametrize("inputs", [torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
def test_an_encoder_by_widths_reads_what_inputs_gives_in_its_own_precision(inputs, latents):
    model, x = model_of(latents), torch.linspace(-1, 1, N, dtype=torch.float64)
    check(model, avi.AmortizedGuide(model, encoder=(4,), inputs=lambda x: (3 * x).to(inputs).unsqueeze(-1)), x)


@pytest.mark.parametrize("latents", [("real",), ("categorical",)], ids=" and ".join)
def test_an_encoder_of_ones_own_has_to_have_the_precision_of_the_rows(latents):
    model, x = model_of(latents), torch.linspace(-1, 1, N, dtype=torch.float64)
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 4))
    with pytest.raises(ValueError, match=r"encoder.to\(torch.float64\)"):
        avi.AmortizedGuide(model, encoder=encoder).setup(x)
    check(model, avi.AmortizedGuide(model, encoder=encoder.double()), x)
