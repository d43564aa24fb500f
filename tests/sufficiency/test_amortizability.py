"""Verdicts on structures whose answer is known, held against numbers: no verdict is refuted, and each no is proved."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from gallery import (
    factor_analysis,
    gaussian_mixture,
    hierarchical_logistic,
    item_response,
    matrix_factorization,
    poisson_lognormal,
    state_space,
    topic_model,
    vae,
)
from tests.sufficiency.structures_with_answers import (
    ANSWERS,
    moving_average,
    normal_normal,
    random_walk,
    saw,
    softmax,
)
from tests.sufficiency.structures_with_answers import (
    vae as small_vae,
)

# Gradients that are equal up to rounding, and those that are not.
EQUAL, DIFFERENT = 1e-10, 1e-7

GALLERY = {
    "factor_analysis": lambda: (factor_analysis.model, factor_analysis.data(8, 4)[:1], {}),
    "gaussian_mixture": lambda: (gaussian_mixture.model, gaussian_mixture.data(8, 4)[:1], {}),
    "hierarchical_logistic": lambda: (
        hierarchical_logistic.model,
        (*hierarchical_logistic.data(5)[:2], 5, hierarchical_logistic.data(5)[2]),
        {"plate": "groups"},
    ),
    "item_response": lambda: (item_response.model, item_response.data(8, 5)[:1], {"plate": item_response.PLATES}),
    "matrix_factorization": lambda: (
        matrix_factorization.model,
        matrix_factorization.data(8, 5)[:3],
        {"plate": "users"},
    ),
    "poisson_lognormal": lambda: (poisson_lognormal.model, poisson_lognormal.data(8, 3)[:2], {}),
    "state_space": lambda: (state_space.model, state_space.data(8, 5)[:1], {}),
    "topic_model": lambda: (topic_model.ProdLDA(8, 20, topic_model.NUM_TOPICS), topic_model.data(8, 20)[:1], {}),
    "vae": lambda: (vae.VAE().model, (vae.data(8),), {}),
}


def of_latent(given, name):
    return given[name] if isinstance(given, dict) else given


@pytest.mark.parametrize("name", ANSWERS)
def test_the_verdict_is_right_and_numbers_do_not_refute_it(name):
    answer = ANSWERS[name]
    verdict = avi.amortizability(answer.model, *answer.args, **answer.options)
    for latent, found in verdict.by_latent.items():
        assert found.possible is of_latent(answer.possible, latent), verdict
        if answer.inputs is not None:
            assert found.inputs_needed == of_latent(answer.inputs, latent)
        if answer.interpolates is not None:
            assert found.interpolates is answer.interpolates, verdict
        assert (found.possible is None) == found.reason.startswith("Undecided")
    if verdict.possible is None:
        return
    across, within = (
        verdict.check(answer.model, *answer.args, transfer=transfer, **answer.options) for transfer in (True, False)
    )
    for latent, found in verdict.by_latent.items():
        # In the same data set there may be no row to compare with; a nan is no evidence either way.
        if found.possible:
            assert across[latent] < EQUAL and not within[latent] > EQUAL
        else:
            assert across[latent] > DIFFERENT
        if found.interpolates:
            assert not within[latent] > EQUAL
        elif answer.interpolates is False:
            assert within[latent] > DIFFERENT


def test_many_structures_have_a_known_answer():
    assert len(ANSWERS) >= 55 and {of_latent(each.possible, "z") for each in ANSWERS.values()} == {True, False, None}


@pytest.mark.parametrize("name", ["saw", "lead", "both_sides", "season", "autoregression_of_data"])
def test_the_window_that_is_needed_is_not_refuted(name):
    answer = ANSWERS[name]
    verdict = avi.amortizability(answer.model, *answer.args)
    for transfer in (True, False):
        assert verdict.check(answer.model, *answer.args, inputs="needed", transfer=transfer)["z"] < EQUAL


@pytest.mark.parametrize("name", GALLERY)
def test_the_models_of_the_gallery_can_be_amortized(name):
    model, args, options = GALLERY[name]()
    verdict = avi.amortizability(model, *args, **options)
    assert verdict.possible is True, verdict
    assert max(verdict.check(model, *args, **options).values()) < EQUAL


@pytest.mark.parametrize(
    ("model", "possible", "inputs"),
    [
        (normal_normal, True, "x"),
        (saw, False, "x in window(1, 0)"),
        (random_walk, False, "x of the whole plate, the row's index"),
        (softmax, False, "x of the whole plate"),
    ],
)
def test_ten_thousand_rows(model, possible, inputs):
    verdict = avi.amortizability(model, torch.rand(10_000) + 0.5)
    assert (verdict.possible, verdict.inputs_needed) == (possible, inputs)


def test_the_verdict_in_words():
    verdict = avi.amortizability(saw, torch.randn(12))
    reason = "Given the global latents, the factor of z depends on data of other rows: x in window(1, 0)."
    assert verdict.reason == reason and verdict.inputs_needed == "x in window(1, 0)"
    assert repr(verdict) == f"Amortizability(possible=False, inputs_needed='x in window(1, 0)', reason={reason!r})"
    assert verdict.table().splitlines()[1].split() == ["z", "data", "no", "no", "x", "in", "window(1,", "0)"]
    assert verdict.table(format="markdown").startswith("| latent | plates |")
    assert verdict.by_latent["z"].coupled is False


def test_structure_names_what_is_no_data():
    def model(x, level):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(level, 1.0)), 1.0), obs=x)

    args = torch.randn(8), torch.randn(8)
    assert avi.amortizability(model, *args).inputs_needed == "x, level"
    fixed = avi.amortizability(model, *args, structure=("level",))
    # What differs by row and is no data, has to be told by the row's index.
    assert (fixed.possible, fixed.inputs_needed) == (False, "x, the row's index")


def test_a_verdict_leaves_the_program_as_it_was():
    pyro.clear_param_store()
    state, dtype, threads = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
    small_vae_decoder = [p.clone() for p in ANSWERS["vae"].model.__globals__["_decoder"].parameters()]
    avi.amortizability(small_vae, *ANSWERS["vae"].args)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == dtype
    assert torch.get_num_threads() == threads and not list(pyro.get_param_store().keys())
    now = ANSWERS["vae"].model.__globals__["_decoder"].parameters()
    assert all(
        one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(small_vae_decoder, now, strict=True)
    )


def test_the_same_verdict_every_time():
    assert avi.amortizability(saw, *ANSWERS["saw"].args) == avi.amortizability(saw, *ANSWERS["saw"].args)


def no_rows(x):
    pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0).expand([len(x)]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: avi.amortizability(no_rows, torch.randn(5)), "Expected a model with latents in a plate"),
        (lambda: avi.amortizability(saw, torch.randn(5), plate="rows"), r"Expected plate= to name one of .*got 'rows'"),
        (
            lambda: avi.amortizability(saw, torch.randn(5), structure=("y",)),
            r"Expected structure= to name tensor arguments among \['x'\], got \['y'\]",
        ),
        (
            lambda: avi.amortizability(saw, torch.randn(9)).check(saw, torch.randn(9), inputs="all"),
            'Expected inputs= to be "own row" or "needed"',
        ),
        (
            lambda: avi.amortizability(saw, torch.randn(9)).check(moving_average, torch.randn(9)),
            r"Expected the model of this verdict, with local latents \['z'\], got one with 'e'",
        ),
        (
            lambda: avi.amortizability(saw, torch.randn(9)).table(format="frame"),
            'Expected format to be "text" or "markdown", got \'frame\'',
        ),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("rows", "words"), [(1, "one row does not"), (2, "2 rows do not")])
def test_few_rows_are_undecided(rows, words):
    verdict = avi.amortizability(normal_normal, torch.randn(rows))
    assert (
        verdict.possible is None
        and verdict.reason == f"Undecided: {words} tell a pattern from chance; call with at least 3."
    )


def test_an_amortized_guide_says_the_reason_on_request():
    x = torch.randn(10)
    guide = avi.AmortizedGuide(saw, encoder=(4,)).setup(x)
    assert "amortizability" not in guide.describe()
    assert guide.describe(x)["amortizability"].endswith("data of other rows: x in window(1, 0).")


def test_a_zero_at_one_point_is_no_proof():
    """Rows that are coupled in a part of the space only are found by the other points."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + (z.roll(1, -1) - 0.5).relu() * (z > 0), 1.0), obs=x)

    assert avi.amortizability(model, torch.randn(6)).by_latent["z"].coupled


def test_gradients_of_two_rows_are_compared_to_the_last_digits():
    differences = avi.amortizability(normal_normal, torch.randn(7)).check(normal_normal, torch.randn(7))
    assert math.isfinite(differences["z"]) and differences["z"] < 1e-14
