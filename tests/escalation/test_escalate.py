"""Escalation: every row is answered by the first level that is good enough, and only those that need more are paid for."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from pyro_avi.closing.parts import Part, part_of
from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.escalation.chains import nuts_draws, row_potential
from pyro_avi.escalation.weighing import Need, weigh

# z_n ~ N(0, 1), x_n ~ N(z_n, 1), so that z_n | x_n ~ N(x_n / 2, 1 / 2) and x_n ~ N(0, 2).
N, S, SD = 8, 400, math.sqrt(0.5)
X = torch.linspace(-3.0, 4.0, N)
EVIDENCE = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X).double()
HARD = [2, 5]


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def tables(of=model, args=(X,), *, scale=1.0):
    """A guide with the posterior of every row, its scale multiplied."""
    guide = avi.FactorizedGuide(of).setup(*args)
    with torch.no_grad():
        guide.table.copy_(torch.stack([X / 2, torch.full((N,), math.log(scale * SD))], 1))
    return guide


def with_hard_rows(guide):
    with torch.no_grad():
        guide.table[HARD] += torch.tensor([4.0, -1.0])
    return guide


def escalate(of, guide, *args, **options):
    options = {"num_samples": S, "num_steps": 60, "max_nuts": 0, "progress": False, **options}
    return avi.escalate(of, guide, *args, **options)


def assert_posterior(answer, tolerance=4.5):
    """Means and evidences within standard errors of the closed forms."""
    error = SD / answer.ess.sqrt()
    assert ((answer.mean()["z"] - X / 2).abs() < tolerance * error).all()
    assert ((answer.evidence - EVIDENCE).abs() < tolerance * answer.evidence_se + 1e-5).all()


def exact_encoder():
    guide = avi.AmortizedGuide(model, torch.nn.Identity(), inputs=lambda x: x[:, None]).setup(X)
    weight, bias = guide.local_parameters()
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5], [0.0]]))
        bias.copy_(torch.tensor([0.0, math.log(SD)]))
    return guide


@pytest.mark.parametrize("guide", [exact_encoder, tables])
def test_rows_of_an_exact_guide_are_answered_by_it(guide):
    answer = escalate(model, guide(), X)
    assert set(answer.levels) == {"amortized"} and answer.met.all() and list(answer.cost) == ["amortized"]
    assert answer.gap.abs().max() < 1e-5 and torch.equal(answer.weights, torch.full_like(answer.weights, 1 / S))
    assert_posterior(answer)
    assert (answer.draws["z"].std(0) / SD - 1).abs().max() < 4.5 / math.sqrt(2 * S)


def test_only_the_hard_rows_climb_and_only_they_are_evaluated():
    seen = []

    def watched(x):
        seen.append(len(x))
        model(x)

    guide = with_hard_rows(tables(watched))
    seen.clear()
    answer = escalate(watched, guide, X)
    hard = torch.zeros(N, dtype=torch.bool)
    hard[HARD] = True
    assert [level != "amortized" for level in answer.levels] == hard.tolist() and answer.met.all()
    assert {answer.levels[row] for row in HARD} == {"refined"} and answer.cost["refined"].rows == 2
    # All rows once, and then none but two.
    first = seen.index(2)
    assert set(seen[:first]) == {N} and seen.count(2) > 60
    assert sum(size == N for size in seen[first:]) <= 2
    assert (answer.seconds[hard] > answer.seconds[~hard].max()).all()
    assert_posterior(answer)


def test_estimated_gaps_are_the_closed_forms():
    # The divergence of a factor 1.2 times as wide, and the second moment of the weights.
    gap, squares = (1.2**2 - 1) / 2 - math.log(1.2), 1.2 / math.sqrt(2 - 1 / 1.2**2)
    guide = tables(scale=1.2)
    options = {"num_samples": 2000, "min_ess": 1000}
    loose, strict = (escalate(model, guide, X, tolerance=tolerance, **options) for tolerance in (0.1, 0.01))
    assert set(loose.levels) == {"amortized"} and set(strict.levels) == {"weighted"} and strict.met.all()
    # By a hundred draws of a row, whose log weights have a standard deviation of 0.3.
    assert loose.gap.mean().item() == pytest.approx(gap, abs=0.015)
    # Weighed are four times as many draws as before, until they are enough.
    assert ((strict.weights > 0).sum(0) == 1600).all() and strict.weights.sum(0).allclose(torch.ones(N).double())
    assert strict.ess.mean().item() == pytest.approx(1600 / squares, rel=0.02)
    assert strict.gap.mean().item() == pytest.approx((squares - 1) / 3200, rel=0.3)
    # Without their weights the same draws are too wide.
    assert torch.equal(loose.draws["z"], strict.draws["z"])
    second = (strict.weights * (strict.draws["z"] - X / 2).square()).sum(0).mean().item()
    assert second == pytest.approx(SD**2, rel=0.04) and loose.draws["z"].var(0).mean().item() > 1.3 * SD**2
    assert_posterior(strict)


# --- two latents that the data tie

PAIR = torch.tensor([0.5, -1.0, 2.0])
NOISE = 0.2


def pair(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), NOISE), obs=x)


PAIR_MEAN = (PAIR / (2 + NOISE**2)).unsqueeze(-1).expand(-1, 2)
PAIR_COVARIANCE = torch.eye(2) - torch.ones(2, 2) / (2 + NOISE**2)


def pair_guide():
    guide = avi.FactorizedGuide(pair).setup(PAIR)
    with torch.no_grad():
        guide.table.copy_(torch.cat([PAIR_MEAN, torch.full((3, 2), math.log(0.2))], 1))
    return guide


def test_correlated_rows_need_a_richer_family():
    options = {"min_ess": 300, "num_steps": 100}
    answer = escalate(pair, pair_guide(), PAIR, **options)
    assert answer.levels == ("richer",) * 3 and answer.met.all()
    error = PAIR_COVARIANCE.diagonal().max().sqrt() / answer.ess.min().sqrt()
    assert (answer.mean()["z"] - PAIR_MEAN).abs().max() < 4.5 * error
    exact = dist.Normal(0.0, math.sqrt(2 + NOISE**2)).log_prob(PAIR).double()
    assert ((answer.evidence - exact).abs() < 4.5 * answer.evidence_se + 1e-4).all()
    # Without it, and without chains, the table says that the tolerance is not met.
    without = escalate(pair, pair_guide(), PAIR, richer=None, **options | {"num_steps": 10})
    assert not without.met.any() and "richer" not in without.cost and "0 of 3 rows within" in without.table()


# --- how many draws are weighed


def test_draws_are_weighed_until_it_is_known_what_they_are_worth():
    # Factors N(0, 1), and posteriors N(shift, 1): the divergence is shift^2 / 2, and so are the weights' variances.
    shift = torch.tensor([0.0, 0.8, 6.0])

    def log_joint(rows, u):
        return dist.Normal(shift[rows], 1.0).log_prob(u.squeeze(-1)).double()

    def weighed(tolerance, min_ess, to_the_end=False):
        torch.manual_seed(0)
        return weigh(
            lambda rows: dist.Normal(torch.zeros(len(rows), 1), 1.0).to_event(1),
            log_joint,
            torch.arange(3),
            as_weights=lambda local: avi.LogWeights(local, local.new_zeros(len(local)), 1.0, has_globals=False),
            need=Need(tolerance, 1000, min_ess),
            to_the_end=to_the_end,
        )

    strict, loose, patient = weighed(0.01, 100), weighed(1.0, 100), weighed(0.01, 100, to_the_end=True)
    # The exact one at once, one after hundreds, and one never.
    assert strict.counts.tolist() == [25, 400, 25] and strict.met.tolist() == [True, True, False]
    assert strict.plain.tolist() == [True, False, False] and loose.plain.tolist() == [True, True, False]
    assert loose.counts[1] < 400 and patient.counts.tolist() == [25, 400, 1000]
    assert ((strict.weights > 0).sum(0) == torch.tensor([1000, 400, 25])).all()
    torch.testing.assert_close(strict.weights.sum(0), torch.ones(3).double())
    # Those that are wanted are as if no others had been.
    torch.testing.assert_close(patient.weights[:, :2], strict.weights[:, :2])
    assert (strict.weights[:, 1] * strict.u[:, 1, 0]).sum().item() == pytest.approx(0.8, abs=0.25)


# --- chains


def test_the_potential_of_a_row_is_its_negative_log_joint():
    joint = LocalJoint(pair, (PAIR,), {}, plate="data")
    mean, scale = torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.5, 0.0], [0.2, 0.7]]).double()
    e = torch.tensor([0.4, -1.1]).double().requires_grad_()
    found = row_potential(joint, 2, torch.randn(1, 3, 2), mean, scale)({"e": e})
    u = mean + scale @ e
    exact = dist.Normal(0.0, 1.0).log_prob(u).sum() + dist.Normal(u.sum(), NOISE).log_prob(PAIR[2].double())
    torch.testing.assert_close(found, -exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, e)[0], -torch.autograd.grad(exact, e)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_chains_have_the_moments_of_the_posterior():
    torch.manual_seed(0)
    joint = LocalJoint(pair, (PAIR[:1],), {}, plate="data")
    # From independent factors as narrow as the worse direction, which are off by twice their standard deviation.
    points = PAIR_MEAN[:1] + 0.4 + 0.2 * torch.randn(100, 1, 2)
    chains = nuts_draws(joint, 0, points, num_samples=200, num_warmup=150, num_chains=2)
    sd, error = PAIR_COVARIANCE[0, 0].sqrt(), PAIR_COVARIANCE[0, 0].sqrt() / math.sqrt(chains.ess)
    assert chains.u.shape == (200, 2) and chains.r_hat < 1.05 and chains.ess > 60
    assert (chains.u.mean(0) - PAIR_MEAN[0]).abs().max() < 3.5 * error < 0.5 * sd
    assert (chains.u.std(0) / sd - 1).abs().max() < 3.5 / math.sqrt(2 * chains.ess)
    # What the data tie, the sum, of which independent factors know nothing.
    assert chains.u.sum(1).std().item() == pytest.approx(PAIR_COVARIANCE.sum().sqrt().item(), rel=0.3)


@pytest.mark.slow
def test_what_is_left_is_sampled_by_chains():
    options = {"richer": None, "max_nuts": 1, "num_samples": 200, "min_ess": 60, "num_warmup": 150, "num_steps": 1}
    answer = escalate(pair, pair_guide(), PAIR, **options)
    chained = torch.tensor([level == "NUTS" for level in answer.levels])
    assert chained.sum() == 1 and answer.cost["NUTS"].rows == 1 and answer.met[chained].all()
    assert answer.gap[chained].isnan().all() and (answer.r_hat[chained] < 1.05).all()
    error = PAIR_COVARIANCE[0, 0].sqrt() / answer.ess.sqrt()
    assert ((answer.mean()["z"] - PAIR_MEAN).abs().amax(1) < 4.5 * error)[chained].all()


# --- calls for a part of the rows


def closed():
    model(X)


def centred(x):
    model(x - x.mean())


@pytest.mark.parametrize("of, args", [(closed, ()), (centred, (X,))])
def test_a_call_that_cannot_be_cut_is_made_for_all_rows(of, args):
    whole = Part(args, {}, LocalJoint(of, args, {}, plate="data"), torch.arange(N))
    # Their mean is not that of all rows.
    rows = torch.tensor([2, 6])
    assert part_of(of, whole, rows, torch.randn(2, N, 1), plate="data") is whole
    cut = Part((X,), {}, LocalJoint(model, (X,), {}, plate="data"), torch.arange(N))
    part = part_of(model, cut, rows, torch.randn(2, N, 1), plate="data")
    assert torch.equal(part.args[0], X[rows]) and part.joint.num_rows == 2


def test_rows_that_cannot_be_cut_out_get_the_same_answers():
    answer = escalate(closed, with_hard_rows(tables(closed, ())))
    assert [row for row, level in enumerate(answer.levels) if level != "amortized"] == HARD and answer.met.all()
    assert_posterior(answer)


def test_global_latents_are_held():
    def with_theta(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(theta + z, 1.0), obs=x)

    guide = avi.FactorizedGuide(with_theta).setup(X)
    answer = escalate(with_theta, guide, X, theta={"theta": torch.tensor(1.0)})
    exact = dist.Normal(1.0, math.sqrt(2.0)).log_prob(X).double()
    assert answer.met.all() and list(answer.draws) == ["z"]
    assert ((answer.evidence - exact).abs() < 4.5 * answer.evidence_se + 1e-4).all()
    assert ((answer.mean()["z"] - (X - 1) / 2).abs() < 4.5 * SD / answer.ess.sqrt()).all()


def test_positive_latents_come_on_their_support():
    def rates(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    counts = torch.tensor([0.0, 3.0, 8.0])
    answer = escalate(rates, avi.ConstantGuide(rates).setup(counts), counts)
    exact = dist.Gamma(2.0 + counts, torch.tensor(2.0))
    assert answer.met.all() and (answer.draws["rate"] > 0).all()
    assert ((answer.mean()["rate"] - exact.mean).abs() < 4.5 * exact.stddev / answer.ess.sqrt()).all()


def test_the_table_by_row():
    answer = escalate(model, with_hard_rows(tables()), X)
    frame = answer.by_row()
    assert len(frame) == N and frame.level.tolist().count("refined") == 2 and frame.met.all()
    assert frame.columns.tolist() == [
        "level",
        "met",
        "gap",
        "evidence",
        "evidence_se",
        "khat",
        "ess",
        "r_hat",
        "seconds",
    ]
    by_level = answer.table(format="frame")
    assert by_level.loc["refined", "tried"] == 2 and by_level.loc["amortized", "rows"] == N - 2


# --- what is refused


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tolerance": 0.0}, ValueError, "tolerance= to be a positive number of nats, got 0.0"),
        ({"tolerance": -0.1}, ValueError, "got -0.1"),
        ({"tolerance": math.nan}, ValueError, "got nan"),
        ({"tolerance": math.inf}, ValueError, "got inf"),
        ({"tolerance": True}, TypeError, "to be a number of nats, got True"),
        ({"tolerance": "little"}, TypeError, "got 'little'"),
        ({"num_samples": 24}, ValueError, "num_samples of at least 25, got 24"),
        ({"min_ess": S + 1}, ValueError, f"min_ess of at most num_samples={S}, got {S + 1}"),
        ({"num_steps": 0}, ValueError, "num_steps of at least 1"),
        ({"num_chains": 1}, ValueError, "num_chains of at least 2"),
        ({"max_nuts": -1}, ValueError, "max_nuts of at least 0"),
    ],
)
def test_options_are_checked_before_the_work(options, error, message):
    def untouched(*args):
        raise AssertionError

    with pytest.raises(error, match=message):
        escalate(untouched, None, X, **options)


def discrete(x):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def tied(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.sample("sum", dist.Normal(z.sum(), 0.1), obs=torch.tensor(0.0))


def crossed(x):
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with columns:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with rows, columns:
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x.reshape(2, 4))


@pytest.mark.parametrize(
    "of, plate, message",
    [
        (discrete, None, "continuous latents, got the discrete \\['y'\\], which no chain of NUTS can move"),
        (crossed, ["rows", "columns"], "latents in one plate of rows, got \\['rows', 'columns'\\]"),
        (tied, None, "sum"),
    ],
)
def test_models_that_not_all_levels_answer_are_refused(of, plate, message):
    guide = avi.FactorizedGuide(of, plate=plate).setup(X)
    with pytest.raises(ValueError, match=message):
        escalate(of, guide, X)


def test_a_model_without_rows_is_refused():
    def alone(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.sum())

    with pytest.warns(UserWarning, match="no plate"):
        guide = avi.FactorizedGuide(alone).setup(X)
    with pytest.raises(ValueError, match="a plate of rows, got one whose latents are all global"):
        escalate(alone, guide, X)


def test_positions_are_refused():
    def positioned(x, index):
        with pyro.plate("data", N, subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = avi.ConstantGuide(positioned).setup(X, torch.arange(N))
    with pytest.raises(ValueError, match="all rows of a data set, got 3 of 8"):
        escalate(positioned, guide, X[:3], torch.arange(3))


def test_a_guide_of_another_kind_is_refused():
    with pytest.raises(TypeError):
        escalate(model, model, X)
