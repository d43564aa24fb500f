"""The timing of the sweep `overhead`: two models, three guides, each also written by hand."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import pyro_avi as avi
from experiments.runner.run_cell import Context

__all__ = ["time_steps"]

_KINDS = {"constant": avi.ConstantGuide, "amortized": avi.AmortizedGuide, "factorized": avi.FactorizedGuide}


class _Workload:
    """A model, its rows, and the sizes that a guide written by hand has to know."""

    def __init__(self, name: str, rows: str):
        self.drawn = rows == "drawn"
        if name == "tiny":
            self.size, self.batch, self.latent_dim, self.global_dim = 200, 20, 2, 0
            self.x, self.encoder = torch.randn(self.size, 4), (4, 16)
            weight = torch.randn(2, 4)

            def model(x: Tensor, index: Tensor | None = None) -> None:
                with self.plate(index) as rows:
                    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                    obs = x[rows] if self.drawn else x
                    pyro.sample("x", dist.Normal(z @ weight, 1.0).to_event(1), obs=obs)

            self.model: Callable = model
        else:
            # The sizes of the image experiment, without the images.
            self.size, self.batch, self.latent_dim = 10_000, 1_000, 64
            self.x, self.encoder = torch.rand(self.size, 1, 28, 28), (784, 64)
            decoder = avi.models.DenseDecoder(64, (256, 256), (1, 28, 28))
            self.global_dim = sum(weight.numel() for weight in decoder.parameters())
            self.model = avi.models.BayesianDecoder(decoder, size=self.size)

    def plate(self, index: Tensor | None) -> pyro.plate:
        options = {"subsample_size": self.batch} if self.drawn else {"subsample": index}
        return pyro.plate("data", self.size, dim=-1, **options)

    def calls(self) -> Iterator[tuple]:
        while self.drawn:
            yield (self.x,)
        yield from avi.minibatches(self.x, batch_size=self.batch)


class _ByHand(PyroModule):
    """A guide as one writes it for one model."""

    def __init__(self, workload: _Workload, kind: str):
        super().__init__()
        self.workload, self.kind = workload, kind
        double = 2 * workload.latent_dim
        if kind == "constant":
            self.vector = nn.Parameter(torch.zeros(double))
        elif kind == "factorized":
            self.table = nn.Parameter(torch.zeros(workload.size, double))
        else:
            inputs, width = workload.encoder
            self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.SiLU())
            self.head = nn.Linear(width, double)
        if workload.global_dim:
            start = torch.zeros(workload.global_dim)
            self.of_globals = nn.Parameter(torch.cat([start, start - 2.0]))

    def forward(self, x: Tensor, index: Tensor | None = None) -> None:
        if self.workload.global_dim:
            loc, log_scale = self.of_globals.chunk(2)
            pyro.sample("theta", dist.Normal(loc, log_scale.exp()).to_event(1))
        with self.workload.plate(index) as rows:
            if self.kind == "constant":
                parameters = self.vector.expand(len(rows), -1)
            elif self.kind == "factorized":
                parameters = self.table[rows]
            else:
                parameters = self.head(self.encoder(x[rows] if self.workload.drawn else x))
            loc, log_scale = parameters.chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def time_steps(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Milliseconds of a step of each, and the ratios of the rounds."""
    torch.manual_seed(settings["seed"])
    pyro.clear_param_store()
    workload = _Workload(settings["workload"], settings["rows"])
    kind, calls = settings["guide"], workload.calls()
    options = {"encoder": workload.encoder[1:], "standardize": False} if kind == "amortized" else {}
    guides = [_KINDS[kind](workload.model, **options), _ByHand(workload, kind)]
    trainings = [SVI(workload.model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()) for guide in guides]
    rounds: list[list[float]] = []
    # As in a training that is meant to be fast.
    with pyro.validation_enabled(False):
        for training in trainings:
            training.step(*next(calls))
        for done in range(settings["rounds"]):
            rounds.append([_milliseconds(training, calls, settings["steps"]) for training in trainings])
            context.progress(done + 1, settings["rounds"], f"ratio {rounds[-1][0] / rounds[-1][1]:.2f}")
    ratios = [ours / hand for ours, hand in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    ours, hand = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"guide_ms": ours, "by_hand_ms": hand, "ratio": ratio, "ratio_quartiles": [low, high]}


def _milliseconds(training: SVI, calls: Iterator[tuple], steps: int) -> float:
    # Processor time of the one thread: that of the others on the machine does not count.
    started = time.process_time()
    for _ in range(steps):
        training.step(*next(calls))
    return (time.process_time() - started) / steps * 1e3
