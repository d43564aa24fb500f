"""What results look like at a prompt: one line, with the number and its error; the version; the figure of a training."""

import configparser
import dataclasses
import importlib.metadata
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_avi as avi
from pyro_avi.diagnostics.sbc_results import Calibration
from pyro_avi.display.formatting import with_error
from pyro_avi.escalation.results import LevelCost
from pyro_avi.gradients.results import GroupNoise
from pyro_avi.sufficiency.verdict import Amortizability, LatentVerdict

X = torch.linspace(-1.0, 1.0, 6)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


NUMBERS = {
    (-80.8412, 0.0312): "-80.841 ± 0.031",
    (0.0999, 0.0996): "0.10 ± 0.10",
    (-1234567.8, 1234.0): "-1,234,600 ± 1,200",
    (0.3, 12.0): "0 ± 12",
    (-1e-5, 0.004): "0.0000 ± 0.0040",
    (3.25, 0.0): "3.25 ± 0",
    (123456789.0, 0.0): "123,456,789 ± 0",
    (5.0, math.nan): "5 ± nan",
    (-math.inf, math.nan): "-inf ± nan",
    (1e-9, 3e-10): "1.00e-09 ± 3.0e-10",
    (-1.23456e14, 3e9): "-1.234560e+14 ± 3.0e+09",
}


@pytest.mark.parametrize("value, error", NUMBERS)
def test_numbers_have_two_digits_of_their_error(value, error):
    assert with_error(value, error) == NUMBERS[value, error]


def test_a_training_of_few_steps_shows_its_last_loss():
    fit = avi.fit(model, avi.ConstantGuide(model), X, num_steps=3, progress=False)
    assert repr(fit) == f"Fit(3 steps, last loss {fit.losses[-1].item():.6g} nats, {fit.seconds:.3g} s)"


@pytest.mark.parametrize("value", [0.0, 1.5, -7e-5, 123.456, -98765.4321, 3e8])
@pytest.mark.parametrize("error", [3e-6, 0.0123, 1.0, 9.96, 451.0])
def test_what_is_shown_is_near(value, error):
    shown, shown_error = (float(number.replace(",", "")) for number in with_error(value, error).split(" ± "))
    assert abs(shown - value) <= 0.051 * error
    assert shown_error == pytest.approx(error, rel=0.05)


def gaps(exact, slack):
    rows = torch.zeros(4)

    def estimate(value):
        return avi.Estimate(value, 0.4, rows, scale=2.5)

    index = avi.TailIndex(0.1, 0.0, rows, ess=torch.ones(4), num_samples=1)
    flags = torch.ones(4, dtype=torch.bool)
    values = [estimate(value) for value in (30.0, 10.0, 20.0)]
    return avi.Gaps(*values, None, estimate(0.0), estimate(0.0), estimate(slack), exact, flags, ~flags, index)


NOISE = avi.EstimatorNoise(
    "pathwise", "ELBO", False, {}, {}, {"local": GroupNoise(4.01234, 0.0312, 2.0)}, {}, seconds=0.01, evaluations=1.0
)

RESULTS = {
    "estimate": (avi.Estimate(-80.8412, 0.0312, torch.zeros(12)), "Estimate(-80.841 ± 0.031 nats, 12 rows)"),
    "one row, one draw": (avi.Estimate(-3.5, math.nan, torch.zeros(1)), "Estimate(-3.5 ± nan nats, 1 row)"),
    "biased, many rows": (
        avi.Estimate(-8084123.0, 312.0, torch.zeros(1).expand(10**9), bias=-41.3),
        "Estimate(-8,084,120 ± 310 nats, bias about -4e+01, 1,000,000,000 rows)",
    ),
    "tail index": (
        avi.TailIndex(1.234, 0.056, torch.tensor([0.2, 1.234, 0.9]), threshold=0.66),
        "TailIndex(1.234 ± 0.056 in the worst of 3 rows, 2 above 0.66)",
    ),
    "log weights": (
        avi.LogWeights(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.zeros(2), 10.0),
        "LogWeights(2 draws of 2 rows, ELBO 40 ± 10 nats)",
    ),
    "blocks, one draw": (
        avi.LogWeights(torch.tensor([[1.0]]), torch.zeros(1), 1.0, blocks={("data",): torch.zeros(4)}),
        "LogWeights(1 draw of 1 block, ELBO 1 ± nan nats)",
    ),
    "coverage": (
        avi.Coverage(torch.tensor([0.5, 0.9]), torch.tensor([[0.5], [0.86]]), torch.tensor([[0.02], [0.012]])),
        "Coverage(2 intervals of 1 quantity, 0.860 ± 0.012 in place of 0.9 the furthest off)",
    ),
    "gaps": (
        gaps(True, 0.0),
        "Gaps(amortization 2.000 ± 0.040, approximation 1.000 ± 0.040, inference 3.000 ± 0.040 nats a row, 4 rows)",
    ),
    "gaps of a bound": (
        gaps(False, 1.0),
        "Gaps(amortization 2.000 ± 0.040, approximation 1.000 ± 0.040 up to 1.100, inference 3.000 ± 0.040 up to 3.100 nats "
        "a row, 4 rows)",
    ),
    "the noise of an estimator": (NOISE, "EstimatorNoise(pathwise, variance local 4.012 ± 0.031, 1 evaluations)"),
    "the noise of estimators": (
        avi.GradientVariance({"pathwise": NOISE}, 50),
        "GradientVariance(1 estimator, 50 draws each)",
    ),
    "an encoder fitted to a table": (
        avi.Distillation(
            None,
            avi.Estimate(24.0, 1.2, torch.zeros(12)),
            avi.Estimate(0.6, 0.12, torch.zeros(12)),
            torch.zeros(3),
        ),
        "Distillation(0.050 ± 0.010 nats a row below the table, 2.00 ± 0.10 before, 12 rows)",
    ),
    "rows that were refined": (
        avi.Refinement(torch.tensor([6, 13, 50]), torch.zeros(3), torch.ones(3), torch.tensor([True, True, False])),
        "Refinement(2 of 3 rows converged, 23 steps a row)",
    ),
    "answers by row": (
        avi.Escalation(
            {},
            torch.zeros(5, 3),
            ("amortized", "NUTS", "amortized"),
            torch.tensor([True, False, True]),
            *[torch.zeros(3)] * 7,
            {"amortized": LevelCost(3, 0.5), "NUTS": LevelCost(1, 1.0)},
            0.01,
            {},
        ),
        "Escalation(2 amortized, 1 NUTS of 3 rows, 2 within 0.01 nats, 1.5 s)",
    ),
    "a verdict": (
        Amortizability((LatentVerdict("z", ("data",), None, True, (), True, False, "It has no rule."),)),
        "Amortizability(possible=None, inputs_needed=\"the row's index\", reason='It has no rule.')",
    ),
    "gaps whose slack is none to speak of": (
        gaps(False, 1e-4),
        "Gaps(amortization 2.000 ± 0.040, approximation 1.000 ± 0.040, inference 3.000 ± 0.040 nats a row, 4 rows)",
    ),
}


def test_every_result_is_a_line_of_its_own():
    public = [value for name in avi.__all__ if isinstance(value := getattr(avi, name), type)]
    results = [value for value in public if dataclasses.is_dataclass(value)]
    assert len(results) >= 7 and [value for value in results if "__repr__" not in vars(value)] == []
    assert {type(result) for result, _ in RESULTS.values()} | {Calibration, avi.Fit} == set(results)


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_one_line(name):
    result, line = RESULTS[name]
    assert repr(result) == str(result) == line


def test_a_calibration_names_the_least_of_its_p_values():
    ranks = torch.stack([torch.arange(100), torch.zeros(100, dtype=torch.long)], -1)
    found = Calibration(ranks, ("z", "log likelihood"), 99, torch.zeros(1))
    assert repr(found) == "Calibration(100 rows, 99 draws each, p = 0.0005 of log likelihood the least of 2)"


# --- a training


def test_a_training_says_its_loss_with_its_error():
    fit = avi.fit(model, avi.AmortizedGuide(model, (4,)), X, num_steps=40, progress=False)
    last = fit.losses[36:]
    shown = with_error(last.mean().item(), last.std().item() / 2)
    assert repr(fit) == f"Fit(40 steps, mean loss {shown} nats in the last 4, {fit.seconds:.3g} s)"


class Read(torch.Tensor):
    """Counts how often, and how much, is read of a tensor."""

    count, numbers = 0, 0

    def cpu(self):
        Read.count, Read.numbers = Read.count + 1, Read.numbers + self.numel()
        return super().cpu().as_subclass(torch.Tensor)


def test_what_a_callback_shows_reads_the_device_once():
    lines = []

    def show(fit):
        if fit.steps == 30:
            fit._buffer = fit._buffer.as_subclass(Read)
            Read.count = Read.numbers = 0
            lines.append(repr(fit))
            assert (Read.count, Read.numbers) == (1, 3)

    avi.fit(model, avi.ConstantGuide(model), X, num_steps=31, progress=False, callbacks=[show])
    assert lines[0].startswith("Fit(30 steps, mean loss ") and "in the last 3," in lines[0]


def test_a_training_that_diverged_says_where():
    fit = avi.fit(model, avi.ConstantGuide(model), X, num_steps=3, progress=False)
    fit._buffer[1:] = torch.nan
    assert repr(fit) == f"Fit(3 steps, diverged at step 1, {fit.seconds:.3g} s)"


def test_times_of_steps_rise_to_the_seconds():
    fit = avi.fit(model, avi.ConstantGuide(model), X, num_steps=250, progress=False)
    assert fit.times.shape == (250,)
    assert (fit.times.diff() > 0).all() and fit.times[0] > 0
    assert fit.times[-1] == pytest.approx(fit.seconds)
    assert {1, 2, 4, 8, 16, 32, 64, 100, 200, 250} <= {steps for steps, _ in fit._clock.laps}


def test_times_leave_out_callbacks():
    taken = []

    def wait(fit):
        if fit.steps == 5:
            torch.linalg.svd(torch.randn(400, 400))
        taken.append(fit.times)

    fit = avi.fit(model, avi.ConstantGuide(model), X, num_steps=10, progress=False, callbacks=[wait])
    assert [len(times) for times in taken] == list(range(1, 11))
    assert fit.times[-1] == pytest.approx(fit.seconds) and (fit.times.diff() > 0).all()


def test_times_of_a_training_that_went_on_go_on(tmp_path):
    guide = avi.ConstantGuide(model)
    begun = avi.fit(model, guide, X, num_steps=3, progress=False)
    begun.save(tmp_path / "training")
    fit = avi.fit(model, guide, X, num_steps=5, progress=False, resume=tmp_path / "training")
    assert fit.times[2] == pytest.approx(begun.seconds) and (fit.times.diff() > 0).all()
    assert fit.times[4] == pytest.approx(fit.seconds) and fit.seconds > begun.seconds
    fit.plot()


# --- its figure


def course_of(losses, count=None):
    fit = avi.fit(model, avi.ConstantGuide(model), X, num_steps=len(losses), progress=False)
    fit._buffer[:] = torch.as_tensor(losses)
    return fit


def test_the_axis_leaves_out_enormous_first_losses():
    torch.manual_seed(0)
    losses = 100 + 900 * torch.exp(-torch.arange(300.0) / 20) + torch.randn(300)
    losses[:3] = torch.tensor([1e12, 1e9, 1e5])
    figure = course_of(losses).plot()
    by_step, by_second = figure.axes
    low, high = by_step.get_ylim()
    assert 80 < low < 100 and 110 < high < 1000
    assert by_second.get_ylim() == (low, high)
    assert [text.get_text() for text in by_step.texts] == ["first loss 1e+12"]


def test_the_axis_has_room_for_first_losses_that_are_near():
    figure = course_of(torch.linspace(10.0, 0.0, 40)).plot()
    low, high = figure.axes[0].get_ylim()
    assert low < 0 and high > 10 and not figure.axes[0].texts


def test_the_line_is_the_median_of_steps_that_follow_one_another():
    losses = torch.arange(300.0) % 5
    axes = course_of(losses).plot().axes[0]
    line = axes.lines[-1]
    assert line.get_ydata().tolist() == [2.0] * 60
    assert line.get_xdata()[:2].tolist() == [3.0, 8.0]


def test_trainings_are_drawn_together():
    one, two = course_of(torch.linspace(2.0, 1.0, 150)), course_of(torch.linspace(3.0, 1.0, 20))
    figure = one.plot({"F-VI": two}, name="A-VI")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["A-VI", "F-VI"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "seconds"]
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [[3.0], [1.0, 1.0, 1.0], [1.0, math.nan, math.inf]])
def test_few_losses_and_losses_that_are_no_numbers_are_drawn(losses):
    figure = course_of([2.0] * len(losses))
    figure._buffer[:] = torch.tensor(losses)
    low, high = figure.plot().axes[0].get_ylim()
    assert math.isfinite(low) and low < losses[0] < high


def test_a_training_without_steps_has_no_figure():
    fit = course_of([1.0])
    fit.steps = 0
    assert repr(fit) == "Fit(no step yet)"
    with pytest.raises(ValueError, match="at least one step, got none of 'training'"):
        fit.plot()


# --- the version


def test_the_version_is_written_once():
    root = Path(avi.__file__).resolve().parents[1]
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: pyro_avi.__version__"
    assert importlib.metadata.version("pyro-avi") == avi.__version__
