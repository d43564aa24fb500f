"""What is read off a model: its latents, the plate of its rows, what it observes there; and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_value
from torch.distributions import constraints

from pyro_avi.structure import inspect_model, row_plate

X = torch.arange(6.0)


def inspect(model, *args, plate=row_plate, init_loc_fn=init_to_feasible, **kwargs):
    return inspect_model(model, args, kwargs, plate=plate, init_loc_fn=init_loc_fn)


def names(latents):
    return [latent.name for latent in latents]


def plain(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_latents_in_the_plate_are_local_and_the_others_global():
    structure = inspect(plain, X)

    assert structure.plate.name == "data"
    assert names(structure.local_latents) == ["z"]
    assert names(structure.global_latents) == ["loc"]
    assert structure.observations == {"x": -1}


def test_a_named_plate_needs_no_observation():
    structure = inspect(plain, None, plate="data")

    assert names(structure.local_latents) == ["z", "x"]
    assert names(structure.global_latents) == ["loc"]
    assert structure.observations == {}


def test_without_a_plate_of_rows_every_latent_is_global():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    structure = inspect(model, X)

    assert structure.plate is None
    assert names(structure.global_latents) == ["scale"]
    assert structure.local_latents == () and structure.observations == {}


def test_the_plate_of_the_rows_is_the_one_with_latents_and_observations():
    def model(x):
        with pyro.plate("features", 3):
            pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        with pyro.plate("others", 2):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(2))

    structure = inspect(model, X)

    assert structure.plate.name == "rows"
    assert names(structure.global_latents) == ["w"]
    assert list(structure.observations) == ["x"]


def test_several_plates_that_could_be_meant_are_listed():
    def model(x):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"got \['inner', 'outer'\](.|\n)*plate='inner'"):
        inspect(model, X.view(2, 3))
    assert inspect(model, X.view(2, 3), plate="outer").plate.name == "outer"


def factor(z, x):
    pyro.factor("x", -((x - z) ** 2), has_rsample=True)


def deterministic(z, x):
    pyro.deterministic("x", x - z)


def latent_dependent(z, x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x - z)


def beside_data(z, x):
    factor(z, x)
    pyro.deterministic("square", z * z)
    pyro.sample("residual", dist.Normal(0.0, 1.0), obs=x - z)
    pyro.sample("data", dist.Normal(z, 1.0), obs=x)


def observing(statement):
    def model(x):
        with pyro.plate("rows", 6):
            statement(pyro.sample("z", dist.Normal(0.0, 1.0)), x)

    return model


@pytest.mark.parametrize(
    "statement, plate, observations",
    [
        (factor, None, []),
        (deterministic, None, []),
        (latent_dependent, None, []),
        (beside_data, "rows", ["data"]),
    ],
)
def test_only_data_count_as_observations(statement, plate, observations):
    structure = inspect(observing(statement), X)

    assert (structure.plate and structure.plate.name) == plate
    assert list(structure.observations) == observations


def test_missing_values_are_data():
    x = X.clone()
    x[2] = torch.nan

    def model(x):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=~x.isnan()):
                pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    assert list(inspect(model, x).observations) == ["x"]


def test_rows_drawn_by_the_model_are_data():
    def model(x):
        with pyro.plate("rows", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    structure = inspect(model, X)

    assert list(structure.observations) == ["x"]
    assert (structure.plate.size, structure.plate.full_size) == (2, 6)


def test_the_rows_of_an_observation_are_found_among_its_dimensions():
    def model(images, labels):
        with pyro.plate("rows", 6, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("raters", 4, dim=-1):
                pyro.sample("labels", dist.Bernoulli(logits=z[..., 0]), obs=labels)
            pyro.sample("images", dist.Normal(z[..., :1, None], 1.0).expand([6, 1, 3, 3]).to_event(2), obs=images)

    assert inspect(model, torch.zeros(6, 1, 3, 3), torch.zeros(6, 4), plate="rows").observations == {
        "labels": -2,
        "images": -4,
    }


SUPPORTS = {
    "real": (dist.Normal(0.0, 1.0), (6,), 0, 0),
    "real vector": (dist.Normal(torch.zeros(3), 1.0).to_event(1), (6, 3), 1, 1),
    "multivariate": (dist.MultivariateNormal(torch.zeros(3), torch.eye(3)), (6, 3), 1, 1),
    "positive": (dist.Gamma(2.0, 1.0), (6,), 0, 0),
    "unit interval": (dist.Beta(2.0, 2.0), (6,), 0, 0),
    "simplex": (dist.Dirichlet(torch.ones(3)), (6, 2), 1, 1),
    "correlations": (dist.LKJCholesky(3, 1.0), (6, 3), 2, 1),
}


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports_are_unconstrained(name):
    fn, shape, event_dim, unconstrained_event_dim = SUPPORTS[name]

    def model(x):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(z.reshape(6, -1)[:, 0], 1.0), obs=x)

    (latent,) = inspect(model, X).local_latents

    assert latent.initial.shape == shape
    assert (latent.event_dim, latent.unconstrained_event_dim) == (event_dim, unconstrained_event_dim)
    assert latent.is_real is name.startswith(("real", "multivariate"))
    value = latent.to_support(latent.initial + 0.3)
    assert value.shape == fn.expand((6,)).shape()
    assert fn.support.check(value).all()


def test_initial_values_are_those_of_init_loc_fn():
    value = torch.linspace(0.5, 3.0, 6)

    def model(x):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    (latent,) = inspect(model, X, init_loc_fn=init_to_value(values={"z": value})).local_latents

    torch.testing.assert_close(latent.initial, value.log())
    torch.testing.assert_close(latent.to_support(latent.initial), value)


def test_inner_plates_of_a_fixed_size_belong_to_the_row():
    def model(x):
        with pyro.plate("rows", 6, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", 4, dim=-1):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    structure = inspect(model, torch.zeros(6, 4), plate="rows")

    assert names(structure.local_latents) == ["z", "w"]
    assert [latent.initial.shape for latent in structure.local_latents] == [(6, 1), (6, 4)]
    assert structure.observations == {"x": -2}


def test_the_program_around_is_left_as_it_was():
    pyro.clear_param_store()
    pyro.param("mine", torch.ones(2))

    def model(x):
        bias = pyro.param("bias", torch.zeros(()))
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(bias, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with poutine.trace() as outer:
        torch.manual_seed(0)
        state = torch.get_rng_state()
        inspect(model, X)
        assert torch.equal(torch.get_rng_state(), state)
    assert not [site for site in outer.trace.nodes if site not in ("_INPUT", "_RETURN")]
    assert torch.is_grad_enabled()
    assert torch.equal(pyro.param("mine"), torch.ones(2))
    pyro.clear_param_store()


def sequential(x):
    for i in pyro.plate("steps", 6):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def in_rows(statement):
    def model(x):
        with pyro.plate("rows", 6):
            pyro.sample("x", dist.Normal(statement(), 1.0), obs=x)

    return model


def moving_support():
    width = pyro.sample("width", dist.Gamma(2.0, 1.0))
    return pyro.sample("z", dist.Uniform(0.0, 1.0 + width))


def moving_shape():
    count = int(pyro.sample("count", dist.Gamma(2.0, 1.0).expand([6])).sum() * 1000)
    return pyro.sample("z", dist.Normal(torch.zeros(count), 1.0).to_event(1)).sum(-1)


def moving_list():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return z + pyro.sample(f"step_{float(z[0])}", dist.Normal(0.0, 1.0))


def masked():
    with poutine.mask(mask=X > 2):
        return pyro.sample("z", dist.Normal(0.0, 1.0))


def scaled():
    with poutine.scale(scale=0.5):
        return pyro.sample("z", dist.Normal(0.0, 1.0))


def discrete():
    return pyro.sample("z", dist.Bernoulli(0.5))


def subsampled_inside(x):
    with pyro.plate("rows", 6, dim=-2), pyro.plate("inner", 4, dim=-1, subsample_size=2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


REFUSED = {
    "a plate that does not exist": (plain, "dota", r"plates \['data'\], got 'dota'"),
    "sequential plate": (sequential, "steps", "latent 'z_0', got the sequential plate 'steps'"),
    "support": (in_rows(moving_support), row_plate, "latent 'z' with one event shape, batch shape and support"),
    "shape": (in_rows(moving_shape), row_plate, "latent 'z' with one event shape"),
    "list of sites": (in_rows(moving_list), row_plate, r"same sites in every run.*'step_"),
    "mask": (in_rows(masked), row_plate, "latent 'z' without poutine.mask"),
    "scale": (in_rows(scaled), row_plate, "latent 'z' without poutine.mask and poutine.scale"),
    "discrete": (in_rows(discrete), row_plate, "Continuous inference cannot handle discrete sample site 'z'"),
    "subsampled inside a row": (subsampled_inside, "rows", "plate 'inner' of latent 'w' to have a fixed size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    model, plate, message = REFUSED[name]
    x = torch.zeros(6, 2) if name == "subsampled inside a row" else X

    with pytest.raises(ValueError, match=message):
        inspect(model, x, plate=plate)


def test_constraints_of_one_kind_are_not_taken_for_a_moving_support():
    def model(x):
        with pyro.plate("rows", 6):
            # A new constraint object with new bound tensors at every run.
            z = pyro.sample("z", dist.Uniform(torch.zeros(()), torch.ones(()) * 2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    (latent,) = inspect(model, X).local_latents
    assert isinstance(latent.support, constraints.interval)
