"""The cells of the sweep `gradients` that train nothing: functions of draws whose variances are known, and a linear model."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_avi as avi
from experiments.runner.run_cell import Context

__all__ = ["measure"]

# A density that counts nothing, so that the cost is f alone.
_NOTHING = torch.tensor(False)


class _Problem(nn.Module):
    """A latent in each of many equal rows, and a cost f of it alone; the guide's parameter, and its constant baseline."""

    def __init__(
        self, parameter: Tensor, factor: Callable[[Tensor], Any], f: Callable[[Tensor], Tensor], baseline: float | None
    ):
        super().__init__()
        self.parameter = nn.Parameter(parameter)
        self.factor, self.f, self.baseline = factor, f, baseline

    def model(self) -> None:
        with pyro.plate("data", len(self.parameter)):
            with poutine.mask(mask=_NOTHING):
                z = pyro.sample("z", self.factor(self.parameter.detach()))
            pyro.factor("f", self.f(z))

    def forward(self) -> None:
        pyro.module("problem", self)
        infer = {}
        if self.baseline is not None:
            infer = {
                "baseline": {"baseline_value": self.parameter.new_tensor(self.baseline).expand(len(self.parameter))}
            }
        with pyro.plate("data", len(self.parameter)), poutine.mask(mask=_NOTHING):
            pyro.sample("z", self.factor(self.parameter), infer=infer)


def measure(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """By estimator the variance of the gradient, its standard error, and what it is by theory where that is known."""
    torch.manual_seed(settings["seed"])
    return {"lines": {"normal": _normal, "coin": _coin, "linear": _linear}[settings["kind"]](settings, context)}


def _normal(settings: Mapping[str, Any], context: Context) -> list[dict]:
    mu, dim = settings["mu"], settings["dim"]
    best = -(dim + 2) / 2
    known = {
        "pathwise": (None, 1.0),
        "score_function": (
            None,
            (dim + 2) * (dim + 4) / 4 if mu == 0 else mu**4 / 4 + 3.5 * mu**2 + 3.75 if dim == 1 else None,
        ),
        "decaying_baseline": (None, None),
        "leave_one_out": (None, None),
    }
    if mu == 0:
        known["best constant baseline"] = (best, (dim + 2) / 2)
    start = torch.full((settings["rows"], dim), mu, dtype=torch.double)

    def problem(baseline: float | None) -> _Problem:
        return _Problem(start, lambda m: dist.Normal(m, 1.0).to_event(1), lambda z: -0.5 * z.square().sum(-1), baseline)

    return _lines(problem, known, settings, context)


def _coin(settings: Mapping[str, Any], context: Context) -> list[dict]:
    p, high, low = settings["p"], settings["high"], settings["low"]

    def variance(c: float) -> float:
        mean = p * (1 - p) * (high - low)
        return p * (1 - p) ** 2 * (high - c) ** 2 + (1 - p) * p**2 * (low - c) ** 2 - mean**2

    average, best = p * high + (1 - p) * low, (1 - p) * high + p * low
    known = {
        "score_function": (None, variance(0.0)),
        "mean as baseline": (average, variance(average)),
        "best constant baseline": (best, 0.0),
        "leave_one_out": (None, None),
        "enumeration": (None, 0.0),
    }
    start = torch.full((settings["rows"],), math.log(p / (1 - p)), dtype=torch.double)

    def problem(baseline: float | None) -> _Problem:
        return _Problem(start, lambda m: dist.Bernoulli(logits=m), lambda z: low + (high - low) * z, baseline)

    return _lines(problem, known, settings, context)


def _lines(
    problem: Callable[[float | None], _Problem],
    known: Mapping[str, tuple],
    settings: Mapping[str, Any],
    context: Context,
) -> list[dict]:
    """Of each estimator the variance of an element of the gradient, the mean over the rows, which are as many draws."""
    lines = []
    for done, (name, (baseline, expected)) in enumerate(known.items()):
        pair = problem(baseline)
        estimator = name if baseline is None else "rao_blackwellized"
        found = avi.gradient_variance(
            pair.model, pair, estimators=[estimator], num_samples=settings["draws"], max_memory=2**32, progress=False
        )[estimator]
        (variance,) = found.variance.values()
        by_row = variance.flatten(1).mean(1) if variance.dim() > 1 else variance
        se = by_row.std().item() / len(by_row) ** 0.5
        lines.append({"estimator": name, "variance": by_row.mean().item(), "se": se, "expected": expected,
                      "evaluations": found.evaluations})  # fmt: skip
        context.progress(done + 1, len(known), name)
    return lines


def _linear(settings: Mapping[str, Any], context: Context) -> list[dict]:
    """The gradient in the table of the guide, at the best factors or away from them."""
    dim, rows = settings["latent_dim"], settings["num_rows"]
    # Orthogonal columns: the posterior is a product of normals, which the guide contains.
    loadings = torch.linalg.qr(torch.randn(2 * dim, dim, dtype=torch.double))[0]
    model = avi.models.FactorAnalysis(loadings, 0.5, size=rows)
    x = model().detach()
    guide = avi.FactorizedGuide(model).setup(x)
    best = model.best_diagonal(x)
    loc, scale = best.mean, best.stddev
    with torch.no_grad():
        moved = loc + settings["off"] * scale * torch.randn_like(loc).sign()
        guide.table.copy_(torch.cat([moved, scale.log()], -1))
    found = avi.gradient_variance(model, guide, x, num_samples=settings["draws"], max_memory=2**32, progress=False)
    context.progress(1, 1, "")
    return [
        {"estimator": name, "bound": each.bound, "variance": group.variance, "se": group.se, "snr": _finite(group.snr),
         "evaluations": each.evaluations, "seconds": each.seconds}
        for name, each in found.estimators.items()
        for group in each.groups.values()
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
