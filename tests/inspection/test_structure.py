"""What is read off a model: its latents, the plate of its rows, what it observes there; and what is refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_value
from torch.distributions import constraints
from torch.distributions.transforms import ExpTransform

from pyro_avi.inspection.inspect_model import inspect_model
from pyro_avi.inspection.sites import row_plate, row_plates

X = torch.arange(6.0)


def one_plate(trace):
    plate = row_plate(trace)
    return () if plate is None else (plate,)


def inspect(model, *args, plate=one_plate, init_loc_fn=init_to_feasible, **kwargs):
    plates = (plate,) if isinstance(plate, str) else plate
    return inspect_model(model, args, kwargs, plates=plates, init_loc_fn=init_loc_fn)


def frame(structure):
    (rows,) = structure.row_sets
    (only,) = rows.frames
    return only


def observed(structure):
    (rows,) = structure.row_sets
    return rows.observations


def names(latents):
    return [latent.name for latent in latents]


def plain(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_latents_in_the_plate_are_local_and_the_others_global():
    structure = inspect(plain, X)

    assert frame(structure).name == "data"
    assert names(structure.local_latents) == ["z"]
    assert names(structure.global_latents) == ["loc"]
    assert observed(structure) == {"x": (-1,)}


def test_a_named_plate_needs_no_observation():
    structure = inspect(plain, None, plate="data")

    assert names(structure.local_latents) == ["z", "x"]
    assert names(structure.global_latents) == ["loc"]
    assert observed(structure) == {}


def test_without_a_plate_of_rows_every_latent_is_global():
    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    structure = inspect(model, X)

    assert structure.row_sets == () and structure.frames == {} and structure.local_latents == ()
    assert names(structure.global_latents) == ["scale"]
    assert structure.observations == ("x",)


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

    assert list(structure.frames) == ["rows"]
    assert names(structure.global_latents) == ["w"]
    assert list(observed(structure)) == ["x"] and structure.observations == ("x", "y")


def test_several_plates_that_could_be_meant_are_listed():
    def model(x):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"got \['inner', 'outer'\](.|\n)*plate='inner'"):
        inspect(model, X.view(2, 3))
    assert frame(inspect(model, X.view(2, 3), plate="outer")).name == "outer"


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

    assert list(structure.frames) == ([] if plate is None else [plate])
    assert (list(observed(structure)) if plate else []) == observations


def test_missing_values_are_data():
    x = X.clone()
    x[2] = torch.nan

    def model(x):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=~x.isnan()):
                pyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    assert list(observed(inspect(model, x))) == ["x"]


def test_rows_drawn_by_the_model_are_data():
    def model(x):
        with pyro.plate("rows", 6, subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    structure = inspect(model, X)

    assert list(observed(structure)) == ["x"]
    assert (frame(structure).size, frame(structure).full_size) == (2, 6)


def test_the_rows_of_an_observation_are_found_among_its_dimensions():
    def model(images, labels):
        with pyro.plate("rows", 6, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("raters", 4, dim=-1):
                pyro.sample("labels", dist.Bernoulli(logits=z[..., 0]), obs=labels)
            pyro.sample("images", dist.Normal(z[..., :1, None], 1.0).expand([6, 1, 3, 3]).to_event(2), obs=images)

    structure = inspect(model, torch.zeros(6, 1, 3, 3), torch.zeros(6, 4), plate="rows")

    assert observed(structure) == {"labels": (-2,), "images": (-4,)}


def crossed(x, **options):
    persons, items = pyro.plate("persons", 5, dim=-2), pyro.plate("items", 3, dim=-1, **options)
    with persons:
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with persons, items:
        taste = pyro.sample("taste", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(ability - difficulty + taste, 1.0), obs=x)


def test_latents_of_different_plates_are_different_sets_of_rows():
    structure = inspect(crossed, torch.zeros(5, 3), plate=row_plates)

    assert {rows.plates: names(rows.latents) for rows in structure.row_sets} == {
        ("persons",): ["ability"],
        ("items",): ["difficulty"],
        ("persons", "items"): ["taste"],
    }
    assert [rows.observations for rows in structure.row_sets] == [{"x": (-2,)}, {"x": (-1,)}, {"x": (-2, -1)}]
    assert structure.global_latents == ()


def test_plates_that_give_a_part_of_their_rows_are_noted():
    structure = inspect(crossed, torch.zeros(5, 2), plate=row_plates, subsample_size=2)

    assert [rows.subsampled for rows in structure.row_sets] == [{"x": ("items",)}, {"x": ()}, {"x": ()}]


@pytest.mark.parametrize(
    ("fn", "num_values"),
    [
        (dist.Bernoulli(0.5), 2),
        (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), 2),
        (dist.Categorical(torch.ones(4)), 4),
        (dist.OneHotCategorical(torch.ones(5)), 5),
        (dist.OneHotCategoricalStraightThrough(torch.ones(2, 5)).to_event(1), 5),
        (dist.Normal(0.0, 1.0), None),
    ],
)
def test_discrete_latents_have_a_number_of_values(fn, num_values):
    def model(x):
        with pyro.plate("rows", 6):
            pyro.sample("z", fn)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    (latent,) = inspect(model, X).local_latents
    assert latent.num_values == num_values


@pytest.mark.parametrize("event_dim", [0, 1])
def test_a_positive_support_is_that_of_a_log_normal(event_dim):
    def model(x):
        with pyro.plate("rows", 6):
            fn = dist.Gamma(2.0, 1.0)
            pyro.sample("z", fn.expand([6, 2]).to_event(1) if event_dim else fn)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    (latent,) = inspect(model, X).local_latents
    assert isinstance(latent.transform, ExpTransform) and latent.independent_dim == event_dim


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
    assert observed(structure) == {"x": (-2,)}


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


def bounds_of_rows():
    return pyro.sample("z", dist.Uniform(torch.zeros(6), torch.arange(1.0, 7.0)))


def moving_shape():
    count = int(pyro.sample("count", dist.Gamma(2.0, 1.0).expand([6])).sum() * 1000)
    return pyro.sample("z", dist.Normal(torch.zeros(count), 1.0).to_event(1)).sum(-1)


def moving_list():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    return z + pyro.sample(f"step_{float(z[0])}", dist.Normal(0.0, 1.0))


def counts():
    return pyro.sample("z", dist.Poisson(1.0))


def subsampled_inside(x):
    with pyro.plate("rows", 6, dim=-2), pyro.plate("inner", 4, dim=-1, subsample_size=2):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


REFUSED = {
    "a plate that does not exist": (plain, "dota", r"plates \['data'\], got 'dota'"),
    "sequential plate": (sequential, "steps", "latent 'z_0', got the sequential plate 'steps'"),
    "support": (in_rows(moving_support), one_plate, "latent 'z' with one event shape, batch shape and support"),
    "bounds": (in_rows(bounds_of_rows), one_plate, "latent 'z' with one support for all rows.*differ by row"),
    "shape": (in_rows(moving_shape), one_plate, "latent 'z' with one event shape"),
    "list of sites": (in_rows(moving_list), one_plate, r"same sites in every run.*'step_"),
    "counts": (
        in_rows(counts),
        one_plate,
        "latent 'z' with real values or those of a Bernoulli, Categorical or OneHotCategorical, got Poisson",
    ),
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
    # Of any number of rows.
    assert latent.to_support(torch.zeros(3, 1)).tolist() == [[1.0]] * 3


def test_bounds_may_differ_inside_a_row():
    def model(x):
        with pyro.plate("rows", 6):
            z = pyro.sample("z", dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 5.0])).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    (latent,) = inspect(model, X).local_latents
    assert latent.to_support(torch.zeros(3, 2)).tolist() == [[1.0, 3.0]] * 3
