"""The work of a cell: encoders of windows trained on series that are drawn anew at every step, and what they lose."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import pyro_avi as avi
from experiments.runner.run_cell import Context
from pyro_avi.encoders import Polynomial

__all__ = ["measure"]

Model = avi.models.LinearGaussianStateSpace | avi.models.GaussianProcess


class Values(nn.Module):
    """The values of a window, without the flags of its ends: what the closed form allows for."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, W]`` of ``[B, W, 2]``."""
        return x[..., 0]


class MeanParameters:
    """The mean of a guide's parameters over the second half of a training; a callback of it.

    What wide windows of a smooth series hold is nearly the same number many times: the bound is hundreds of times more
    curved along their differences than along their sum, which is left where the noise of the last steps has moved it. In the
    mean that noise cancels.

    Args:
        guide: whose parameters they are.
        steps: of the training.

    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, https://doi.org/10.1137/0330046.
    """

    def __init__(self, guide: nn.Module, steps: int):
        self._parameters, self._first, self._count = list(guide.parameters()), steps // 2 + 1, 0
        self._sums = [torch.zeros_like(each, dtype=torch.double) for each in self._parameters]

    @torch.no_grad()
    def __call__(self, fit: avi.Fit) -> None:
        """Count a step."""
        if fit.steps >= self._first:
            self._count += 1
            for total, each in zip(self._sums, self._parameters, strict=True):
                total += each

    @torch.no_grad()
    def take(self) -> None:
        """Write the means into the guide."""
        for total, each in zip(self._sums, self._parameters, strict=True):
            each.copy_(total / self._count)


def measure(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """By window the gap that is measured, on average over new series, and the closed form of the best linear encoder's."""
    model = _model(settings)
    generator = torch.Generator().manual_seed(settings["seed"])
    found = []
    tests = [_draw(model, generator) for _ in range(settings["series"])]
    for done, width in enumerate(settings["windows"]):
        torch.manual_seed(settings["seed"])
        encoder = nn.Sequential(Values(), Polynomial(2 * width + 1, 1))
        guide = avi.AmortizedGuide(model, encoder, inputs=avi.Window(width, width)).setup(tests[0])
        rate, steps = settings["rate"], settings["steps"]
        mean = MeanParameters(guide, steps)
        avi.fit(
            model,
            guide,
            batches=((_draw(model, generator),) for _ in range(steps)),
            num_steps=steps,
            # Of its gradient only that part is noise which the best factors do not explain.
            elbo=avi.StickingTheLandingELBO(),
            lr=lambda step, rate=rate, steps=steps: 0.5 * rate * (1 + math.cos(math.pi * step / steps)),
            seed=settings["seed"],
            progress=False,
            callbacks=[mean],
        )
        mean.take()
        gaps = torch.stack(list(_gaps(model, guide, tests)))
        error = gaps.std() / len(gaps) ** 0.5
        closed_form = model.window_gap(width).item()
        found.append({"window": width, "gap": gaps.mean().item(), "se": error.item(), "closed_form": closed_form})
        context.progress(
            done + 1, len(settings["windows"]), f"{found[-1]['gap']:.3g}, {closed_form:.3g} by the closed form"
        )
    return {"windows": found, "approximation_gap": model.approximation_gap(tests[0]).item()}


def _model(settings: Mapping[str, Any]) -> Model:
    one = torch.ones(1, 1)
    if settings["model"] == "chain":
        phi, q, r = settings["numbers"]
        return avi.models.LinearGaussianStateSpace(
            phi * one, one, size=settings["rows"], transition_scale=q, emission_scale=r
        )
    length, r = settings["numbers"]

    def matern(grid: Tensor) -> Tensor:
        distance = 3**0.5 * (grid.unsqueeze(-1) - grid).abs() / length
        return (1 + distance) * (-distance).exp()

    return avi.models.GaussianProcess(matern, torch.arange(float(settings["rows"])), r)


def _draw(model: Model, generator: torch.Generator) -> Tensor:
    """A series of the model's."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        return model()


def _gaps(model: Model, guide: avi.AmortizedGuide, series: list[Tensor]) -> Iterator[Tensor]:
    """What the encoder loses on each series beyond the family."""
    for x in series:
        yield model.inference_gap(x, guide.fixed_posterior(x)) - model.approximation_gap(x)
