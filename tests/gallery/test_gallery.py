"""Every model of the gallery, small: it runs, it trains, it has a page; and what is exactly known of some."""

import math
import re
from importlib import import_module
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import gallery
import pyro_avi as avi
from gallery import gaussian_mixture, hierarchical_logistic, matrix_factorization, state_space, topic_model, vae

PAGES = Path(__file__).resolve().parents[2] / "docs" / "gallery"
SMALL = {"num_rows": 24, "num_steps": 12, "num_samples": 3}


@pytest.mark.parametrize("name", gallery.names())
def test_the_three_guides_train(name):
    table = import_module(f"gallery.{name}").run(**SMALL)
    found = {row.guide: row for row in table.rows}
    assert {"constant", "amortized", "factorized"} <= set(found)
    for row in table.rows:
        numbers = [row.elbo, row.se, row.before, row.seconds, *row.columns.values()]
        assert all(map(math.isfinite, numbers)), row
        assert row.elbo > row.before, row
        assert row.guide in str(table) and f"{row.elbo:.1f} ± {row.se:.1f}" in str(table)
    # One factor is contained in a factor for each row, by number of parameters too.
    assert found["constant"].parameters < found["factorized"].parameters


@pytest.mark.parametrize("name", gallery.names())
def test_data_are_the_same_every_time(name):
    data, state = import_module(f"gallery.{name}").data, torch.get_rng_state()
    once, again = ([x] if isinstance(x, torch.Tensor) else x for x in (data(7), data(7)))
    assert all(map(torch.equal, once, again))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", gallery.names())
def test_every_model_has_a_page(name):
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"python -m gallery.{name}\n" in page
    assert f"../../gallery/{name}.py" in page
    assert all(re.search(rf"^{guide} ", page, re.MULTILINE) for guide in ("constant", "amortized", "factorized"))
    assert name in (PAGES / "index.md").read_text(encoding="utf-8").split()


def test_no_page_is_left_without_its_model():
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *gallery.names()}


@pytest.mark.parametrize("name", gallery.names())
def test_every_module_is_a_program(name):
    source = Path(import_module(f"gallery.{name}").__file__).read_text(encoding="utf-8")
    assert source.endswith('if __name__ == "__main__":\n    print(run())\n')
    assert ".. math::" in source.split('"""')[1]


# --- identities


def log_prob(model, *args, data=None):
    torch.manual_seed(0)
    return poutine.trace(poutine.condition(model, data=data or {})).get_trace(*args).log_prob_sum()


def test_the_tutorials_guide_and_ours_are_one_guide():
    x, guides = vae.data(40), vae.guides()
    by_hand, ours = guides["by hand"], guides["amortized"]
    encoder = by_hand.model.__self__.encoder
    ours.setup(x)
    ours.encoder.load_state_dict(encoder.hidden.state_dict())
    with torch.no_grad():
        ours.head.weight.copy_(torch.cat([encoder.loc.weight, encoder.log_scale.weight]))
        ours.head.bias.copy_(torch.cat([encoder.loc.bias, encoder.log_scale.bias]))

    def weights(guide):
        torch.manual_seed(0)
        return avi.log_weights(guide.model, guide, x, num_samples=2, seed=0).local

    assert torch.allclose(weights(ours), weights(by_hand), rtol=1e-5)
    with torch.no_grad():
        ours.head.bias[0] += 0.01
    assert not torch.allclose(weights(ours), weights(by_hand), rtol=1e-4)


def test_the_mixtures_closed_form_is_the_integral():
    x, _ = gaussian_mixture.data(3, num_columns=2)
    guide = gaussian_mixture.guides(x)["constant"].setup(x)
    estimates = {name: value for name, value in guide.median(x).items() if name != "z"}
    theta = {name: value.double() for name, value in estimates.items()}
    grid = torch.linspace(-6, 6, 121).double()
    z = torch.cartesian_prod(grid, grid)
    mean = theta["locs"].unsqueeze(1) + z @ theta["loadings"].mT
    joint = dist.Normal(mean, theta["scale"]).to_event(1).log_prob(x.double()[:, None, None])
    joint = joint + theta["weights"].log().unsqueeze(-1) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    integral = (joint.flatten(1).logsumexp(-1) + 2 * (grid[1] - grid[0]).log()).sum()
    prior = poutine.block(gaussian_mixture.model, hide=["component", "z", "x"])
    expected = integral + log_prob(prior, x, data=estimates)
    assert gaussian_mixture.log_joint(guide, (x,), 1) == pytest.approx(expected.item(), rel=1e-5)


def test_the_mixtures_bound_is_a_bound():
    table = gaussian_mixture.run(**SMALL)
    for row in table.rows:
        assert row.elbo < row.columns["log p(x, theta)"] + 5 * row.se


def test_a_groups_summary_does_not_depend_on_the_order_of_its_members():
    x, group, y, _ = hierarchical_logistic.data(10)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    summary = hierarchical_logistic.summary(x, group, 10, y)
    assert torch.allclose(hierarchical_logistic.summary(x[order], group[order], 10, y[order]), summary, atol=1e-5)
    assert not torch.allclose(hierarchical_logistic.summary(x, group[order], 10, y), summary, atol=1e-1)


def test_ratings_that_are_missing_count_for_nothing():
    features, ratings, rated, _ = matrix_factorization.data(6)
    expected = log_prob(matrix_factorization.model, features, ratings, rated)
    assert log_prob(matrix_factorization.model, features, ratings.where(rated, 99.0), rated) == expected
    assert log_prob(matrix_factorization.model, features, ratings.where(~rated, 9.0), rated) != expected


def test_a_path_is_an_autoregression():
    returns, path = state_space.data(4, num_times=6)
    mean, phi, scale = torch.tensor([-0.5, 0.9, 0.3])
    data = {"mean": mean, "persistence": phi, "scale": scale, "log_variance": path}
    trace = poutine.trace(poutine.condition(state_space.model, data=data)).get_trace(returns)
    trace.compute_log_prob()
    first = dist.Normal(mean, scale / (1 - phi**2).sqrt()).log_prob(path[:, 0])
    steps = dist.Normal(mean + phi * (path[:, :-1] - mean), scale).log_prob(path[:, 1:])
    assert torch.allclose(trace.nodes["log_variance"]["log_prob"], first + steps.sum(-1), rtol=1e-4)


def test_documents_of_any_length_have_the_probability_of_their_own_length():
    counts, probs = topic_model.data(5)
    assert len(set(counts.sum(-1).tolist())) > 1
    joint = dist.Multinomial(120, probs).log_prob(counts)
    own = [dist.Multinomial(int(x.sum()), p).log_prob(x) for x, p in zip(counts, probs, strict=True)]
    assert torch.allclose(joint, torch.stack(own))
