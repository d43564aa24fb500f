"""Encoders that read more than a row: neighbours, the whole plate, sets of observations, the global latents."""

import copy
import math
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_avi as avi
from pyro_avi.encoders import Attention, Polynomial, Recurrent, Set
from tests.marks import needs_compiler

N = 8
X = torch.linspace(-2.0, 3.0, N)


def read(guide, *args, **kwargs):
    """What the encoder of a guide reads."""
    inputs = []
    with torch.no_grad():
        handle = guide.encoder.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        guide.variational_parameters(*args, **kwargs)
    handle.remove()
    return inputs[0]


def series(x, index=None, before=None):
    """Latents around the last observation; with an index, of some rows."""
    before = torch.cat([torch.zeros(1), x[:-1]]) if before is None else before
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("time", N if index is not None else len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(before, 1.0))
        pyro.sample("x", dist.Normal(z + theta, 1.0), obs=x)


def drawn(x):
    with pyro.plate("time", N, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(torch.cat([torch.zeros(1), x[:-1]])[rows], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def independent(x):
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def randomized(guide):
    with torch.no_grad():
        for parameter in guide.local_parameters():
            parameter.add_(torch.randn_like(parameter))
    return guide


# --- windows


def test_a_window_holds_neighbours_and_marks_the_ends():
    guide = avi.AmortizedGuide(series, (4,), inputs=avi.Window(2, 1), standardize=False).setup(X)

    got = read(guide, X)

    assert got.shape == (N, 4, 2)
    for n in range(N):
        for at, m in enumerate(range(n - 2, n + 2)):
            expected = [X[m].item(), 1.0] if 0 <= m < N else [0.0, 0.0]
            assert got[n, at].tolist() == expected
    # Standardized values are those of the row itself, whatever the window.
    standardized = avi.AmortizedGuide(series, (4,), inputs=avi.Window(2, 1)).setup(X)
    row = read(avi.AmortizedGuide(series, (4,)).setup(X), X)
    assert torch.equal(read(standardized, X)[:, 2, :1], row.reshape(N, 1))


def test_of_rows_that_the_model_draws_neighbours_are_read_from_the_whole_series():
    guide = avi.AmortizedGuide(drawn, (4,), inputs=avi.Window(1, 1)).setup(X)
    whole = avi.AmortizedGuide(independent, (4,), inputs=avi.Window(1, 1)).setup(X)
    randomized(guide)
    whole.load_state_dict(guide.state_dict())

    with poutine.trace() as trace, poutine.seed(rng_seed=1):
        guide(X)
    rows = trace.trace.nodes["time"]["value"]

    fn = trace.trace.nodes["z"]["fn"]
    assert len(rows) == 3 and torch.allclose(fn.mean, whole.posterior(X).mean[rows, 0])
    assert torch.allclose(guide.posterior(X).mean, whole.posterior(X).mean)


def test_of_rows_that_a_call_gives_neighbours_are_read_from_where_it_says():
    index = torch.tensor([5, 0, 3])
    call = (X[index], index, torch.cat([torch.zeros(1), X[:-1]])[index])
    whole = avi.AmortizedGuide(series, (4,), inputs=avi.Window(1, 0, of=lambda x, index=None, before=None: X)).setup(X)
    randomized(whole)

    assert torch.allclose(whole.variational_parameters(*call), whole.variational_parameters(X)[index], atol=1e-6)
    # They are not those of the batch: a twin that reads these differs.
    twin = avi.AmortizedGuide(series, (4,), inputs=avi.Window(1, 0, of=lambda x, *_: x)).setup(X)
    twin.load_state_dict(whole.state_dict())
    with pytest.raises(
        ValueError, match=r"inputs= to return all 8 rows of plate 'time' in dimension 0, got shape \(3,\)"
    ):
        twin.variational_parameters(*call)
    found = avi.AmortizedGuide(series, (4,), inputs=avi.Window(1, 0)).setup(X)
    with pytest.raises(
        ValueError, match="Expected all 8 rows of plate 'time', or a model that draws them, got a call of 3"
    ):
        found.variational_parameters(*call)
    with pytest.raises(ValueError, match="got a call of 3"):
        avi.AmortizedGuide(series, Recurrent(1, (4,))).setup(X).variational_parameters(*call)


def panel(x, known=None):
    """Series side by side, with steps that some of them lack."""
    known = torch.ones(x.shape, dtype=torch.bool) if known is None else known
    with pyro.plate("series", x.shape[0], dim=-2), pyro.plate("time", x.shape[1], dim=-1), poutine.mask(mask=known):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_windows_and_sequences_run_along_the_last_plate_of_several():
    x = torch.randn(3, N)
    plates = ("series", "time")
    guide = avi.AmortizedGuide(panel, (4,), plate=plates, inputs=avi.Window(1, 0), standardize=False).setup(x)

    # Value, its mask, and whether there is such a row.
    got = read(guide, x).reshape(3, N, 2, 3)

    assert torch.equal(got[:, 1:, 0, 0], x[:, :-1]) and torch.equal(got[:, :, 1, 0], x)
    assert (got[:, 0, 0] == 0).all() and (got[:, 1:, :, 1:] == 1).all()
    for encoder in (Recurrent(1, (4,)), Attention(1, 4)):
        guide = randomized(avi.AmortizedGuide(panel, encoder, plate=plates).setup(x))
        one = guide.variational_parameters(x)
        two = guide.variational_parameters(torch.stack([x[0], x[1] + 1.0, x[2]]))
        assert one.shape == (3, N, 2)
        assert torch.allclose(one[[0, 2]], two[[0, 2]]) and not torch.isclose(one[1], two[1]).all(-1).any()


def test_steps_that_a_series_lacks_do_not_matter():
    x, lengths = torch.randn(3, N), torch.tensor([N, 5, 2])
    known = torch.arange(N) < lengths[:, None]
    guide = randomized(avi.AmortizedGuide(panel, Recurrent(1, (4,)), plate=("series", "time")).setup(x, known))

    one = guide.variational_parameters(x, known)
    two = guide.variational_parameters(torch.where(known, x, 100.0), known)

    assert torch.equal(one[known], two[known]) and one.isfinite().all()


# --- the whole plate


@pytest.mark.parametrize("encoder", [Recurrent(1, (4,)), Attention(1, 4)], ids=["recurrent", "attention"])
def test_a_sequence_reads_all_rows_whichever_a_batch_holds(encoder):
    whole = randomized(avi.AmortizedGuide(independent, copy.deepcopy(encoder)).setup(X))
    guide = avi.AmortizedGuide(drawn, copy.deepcopy(encoder)).setup(X)
    guide.load_state_dict(whole.state_dict())
    index = torch.tensor([5, 0, 3])
    given = avi.AmortizedGuide(series, copy.deepcopy(encoder), inputs=lambda *_: X[:, None], plate="time").setup(X)
    given.row_factors[0].load_state_dict(whole.row_factors[0].state_dict())
    expected = whole.variational_parameters(X)

    assert not torch.allclose(expected[0], whole.variational_parameters(X[:3])[0])
    assert torch.allclose(guide.variational_parameters(X), expected)
    assert torch.allclose(given.variational_parameters(X[index], index, X[index]), expected[index])
    with poutine.trace() as trace, poutine.seed(rng_seed=1):
        guide(X)
    rows, fn = trace.trace.nodes["time"]["value"], trace.trace.nodes["z"]["fn"]
    assert len(rows) == 3 and torch.allclose(fn.mean, whole.posterior(X).mean[rows, 0])


# --- sets


def repeated(y, known):
    with pyro.plate("groups", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("members", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0).mask(known), obs=y)


def test_a_set_is_read_without_its_order_and_without_what_is_masked():
    y, known = torch.randn(4, 5), torch.rand(4, 5) > 0.3
    known[:, 0] = True
    guide = randomized(avi.AmortizedGuide(repeated, Set(1, (8,)), plate="groups").setup(y, known))
    expected = guide.variational_parameters(y, known)

    order = torch.randperm(5)
    assert torch.allclose(guide.variational_parameters(y[:, order], known[:, order]), expected, atol=1e-5)
    assert torch.equal(guide.variational_parameters(torch.where(known, y, 9.0), known), expected)
    assert not torch.allclose(guide.variational_parameters(torch.where(known, 9.0, y), known), expected)


def test_a_set_needs_several_observations_a_row():
    with pytest.raises(
        ValueError, match=r"same number of observations a row, \[B, M\] or \[B, M, F\], got shapes \[\(8,\)\]"
    ):
        avi.AmortizedGuide(independent, Set(1, (4,))).setup(X)


def test_neighbours_are_a_set_too():
    guide = avi.AmortizedGuide(independent, Set(1, (4,)), inputs=avi.Window(1, 1)).setup(X)

    got = read(guide, X)

    assert got.shape == (N, 3, 1) and got[0, 0].isnan() and got[-1, 2].isnan() and got.isnan().sum() == 2
    assert guide.variational_parameters(X).isfinite().all()


# --- the global latents


def exact(model, x, guide):
    """Set a guide that reads a row and theta to the exact posterior."""
    given, theta = model.posterior(x, 0.0), model.posterior(x)["theta"]
    slope, scale = model.tau / (model.tau**2 + model.sigma**2), given.base_dist.scale.flatten()[0]
    with torch.no_grad():
        guide.head.weight.copy_(torch.tensor([[slope, -slope], [0.0, 0.0]]))
        guide.head.bias.copy_(torch.tensor([0.0, math.log(scale)]))
        guide.global_guide.vector.copy_(torch.tensor([theta.mean, theta.stddev.log()]))


def test_factors_that_follow_a_draw_of_the_globals_are_the_exact_posterior():
    model = avi.models.NormalNormal(1.155, 2.43, size=20)
    x = 2.0 * torch.randn(20, 1)
    guide = avi.AmortizedGuide(model, nn.Identity(), reads_globals="draw").setup(x).double()
    exact(model, x, guide)
    evidence, x = model.log_evidence(x), x.double()

    def weights(guide):
        found = avi.log_weights(model, guide, x, num_samples=30, progress=False)
        return (found.local.sum(-1) + found.global_).double()

    # Every weight is the evidence; with the mean in place of the draw they scatter.
    assert torch.allclose(weights(guide), evidence, atol=1e-3)
    of_mean = avi.AmortizedGuide(model, nn.Identity(), reads_globals="mean").setup(x).double()
    exact(model, x, of_mean)
    assert weights(of_mean).std() > 0.1 and weights(of_mean).mean() < evidence - 0.05


def test_draws_of_rows_follow_those_of_the_globals():
    model = avi.models.NormalNormal(2.0, 0.1, size=5)
    x = torch.randn(5, 1)
    guide = avi.AmortizedGuide(model, nn.Identity(), reads_globals="draw").setup(x)
    exact(model, x, guide)

    draws = guide.sample(x, num_samples=500)

    theta, z = draws["theta"], draws["z"]
    assert theta.shape == (500,) and z.shape == (500, 5, 1)
    assert torch.corrcoef(torch.stack([theta, z[:, 0, 0]]))[0, 1] < -0.95
    # Without a draw the median stands for it.
    expected = model.posterior(x, guide.median(x)["theta"])
    assert torch.allclose(guide.posterior(x).mean, expected.mean.float(), atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "draw"])
@pytest.mark.parametrize("inputs", [None, avi.Window(1, 0)], ids=["row", "window"])
def test_globals_are_read_with_a_gradient_and_with_any_inputs(how, inputs):
    guide = avi.AmortizedGuide(series, (4,), inputs=inputs, reads_globals=how).setup(X)
    randomized(guide)

    guide.variational_parameters(X).sum().backward()

    assert guide.global_guide.vector.grad.abs().max() > 0
    got = read(guide, X)
    assert torch.equal(got[..., -1], guide.median(X)["theta"].expand(got.shape[:-1]))
    fit = avi.fit(series, guide, X, num_steps=2, compile=False, progress=False)
    assert fit.losses.isfinite().all()
    assert avi.log_weights(series, guide, X, num_samples=2, progress=False).local.isfinite().all()


def test_every_elbo_agrees_where_factors_follow_a_draw():
    guide = randomized(avi.AmortizedGuide(series, (4,), reads_globals="draw").setup(X))

    with torch.no_grad():
        values = {
            elbo: torch.tensor([elbo().loss(series, guide, X) for _ in range(100)])
            for elbo in (pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO, pyro.infer.TraceGraph_ELBO)
        }

    one, *others = values.values()
    for other in others:
        error = (one.var() / 100 + other.var() / 100).sqrt()
        assert abs(one.mean() - other.mean()) < 5 * error


# --- what the verdict asks for


def autoregressive(x):
    innovations = []
    z = torch.zeros(())
    with pyro.plate("time", len(x)):
        noise = pyro.sample("z", dist.Normal(0.0, 1.0))
        for each in noise:
            z = 0.5 * z + each
            innovations.append(z)
        pyro.sample("x", dist.Normal(torch.stack(innovations), 1.0), obs=x)


def shifted(x, c):
    both = c + torch.cat([torch.zeros(1), c[:-1]])
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(both, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def trend(x):
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(torch.arange(len(x)) * 1.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def ranks(x):
    with pyro.plate("time", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.argsort().argsort() * 1.0 + z, 1.0), obs=x)


def test_a_guide_reads_what_the_verdict_asks_for():
    x, c = torch.randn(20), torch.randn(20)

    own = avi.AmortizedGuide(independent, (4,), inputs="needed").setup(x)
    window = avi.AmortizedGuide(series, (4,), inputs="needed").setup(x)
    whole = avi.AmortizedGuide(autoregressive, (4,), inputs="needed").setup(x)
    of_argument = avi.AmortizedGuide(shifted, (4,), inputs="needed", standardize=False).setup(x, c)

    assert own.describe()["reads"] == ["own row"] and read(own, x).shape == (20,)
    assert window.describe()["reads"] == [[1, 0]] and read(window, x).shape == (20, 2, 2)
    assert whole.describe()["reads"] == ["whole plate"] and isinstance(whole.encoder, Recurrent)
    assert of_argument.describe()["reads"] == [[1, 0]]
    assert torch.equal(read(of_argument, x, c)[1:, 0, 1], c[:-1])


@pytest.mark.parametrize(
    "model, encoder, message",
    [
        (trend, (4,), "asks for the row's index"),
        (ranks, (4,), "leaves it open: Undecided"),
        (autoregressive, nn.Linear(1, 4), "an encoder that reads all rows of plate .*got a Linear"),
    ],
    ids=["index", "undecided", "a module"],
)
def test_what_a_guide_cannot_read_is_refused(model, encoder, message):
    with pytest.raises(ValueError, match=message):
        avi.AmortizedGuide(model, encoder, inputs="needed").setup(torch.randn(20))


# --- life


KINDS = {
    "window": (series, {"encoder": (4,), "inputs": avi.Window(1, 0)}, ()),
    "needed window": (series, {"encoder": (4,), "inputs": "needed"}, ()),
    "needed plate": (autoregressive, {"encoder": (4,), "inputs": "needed"}, ()),
    "window of a function": (series, {"encoder": (4,), "inputs": avi.Window(1, 0, of=lambda x: x)}, ("inputs",)),
    "recurrent": (series, {"encoder": Recurrent(1, (4,))}, ("encoder",)),
    "attention": (series, {"encoder": Attention(1, 4)}, ("encoder",)),
    "polynomial": (series, {"encoder": Polynomial(1, 2)}, ("encoder",)),
    "globals": (series, {"encoder": (4,), "reads_globals": "draw"}, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_wide_inputs_live_with_the_guide(kind, tmp_path):
    model, options, again = KINDS[kind]
    x = torch.randn(20)
    guide = randomized(avi.AmortizedGuide(model, **copy.deepcopy(options)).setup(x))
    avi.save(guide, tmp_path / "guide")
    given = {name: options[name] for name in again}
    copies = [copy.deepcopy(guide), avi.load(tmp_path / "guide", model, **given)]
    # Few rows leave a verdict open; the file has it.
    copies += [avi.load(tmp_path / "guide", model, x[:2], **given)]
    if kind != "window of a function":
        copies.append(pickle.loads(pickle.dumps(guide)))

    expected = guide.variational_parameters(x)
    assert all(torch.equal(each.variational_parameters(x), expected) for each in copies)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["window", "recurrent", "attention", "polynomial", "globals"])
def test_compiled_training_reads_the_same(kind):
    model, options, _ = KINDS[kind]

    def losses(compile):
        torch.manual_seed(0)
        guide = avi.AmortizedGuide(model, **copy.deepcopy(options))
        return avi.fit(model, guide, X, num_steps=5, lr=0.01, progress=False, compile=compile).losses

    assert torch.allclose(losses(True), losses(False), rtol=1e-4)


REFUSED = {
    "a window longer than the series": (
        lambda: avi.AmortizedGuide(series, (4,), inputs=avi.Window(N, 0)).setup(X),
        r"more than 8 rows for Window\(8, 0\), got 8",
    ),
    "a later series that is too short": (
        lambda: avi.AmortizedGuide(series, (4,), inputs=avi.Window(3, 0)).setup(X).posterior(X[:3]),
        r"more than 3 rows for Window\(3, 0\), got 3",
    ),
    "a negative window": (lambda: avi.Window(-1, 0), "before of at least 0, got -1"),
    "no function": (lambda: avi.Window(1, 0, of=X), "of= to be a function of the model's arguments, got a Tensor"),
    "other inputs": (lambda: avi.AmortizedGuide(series, inputs="all"), "an avi.Window or 'needed', got 'all'"),
    "other globals": (
        lambda: avi.AmortizedGuide(series, reads_globals="median"),
        "None, 'mean' or 'draw', got 'median'",
    ),
    "rows without data": (lambda: avi.AmortizedGuide(independent, (4,)).setup(X[:0]), "at least one row"),
    "an encoder of the wrong width": (
        lambda: avi.AmortizedGuide(series, nn.Linear(3, 4), inputs=avi.Window(1, 0)).setup(X),
        r"Expected an encoder for a batch of rows .*\(8, 2, 2\).*Linear",
    ),
    "a sequence of the wrong width": (
        lambda: avi.AmortizedGuide(series, Recurrent(2, (4,))).setup(X),
        r"Expected series of rows, \[..., N, 2\], got shape \(8, 1\)",
    ),
    "a verdict on a model without rows": (
        lambda: avi.amortizability(lambda: pyro.sample("theta", dist.Normal(0.0, 1.0))),
        "a model with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]

    with pytest.raises((ValueError, TypeError)) as raised:
        call()

    assert re.search(message, str(raised.value), re.DOTALL), raised.value
