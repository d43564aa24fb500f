"""One cell of the sweep `images`: build model and guide, train, measure."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_sample, init_to_value
from torch import Tensor, nn

import pyro_avi as avi
from experiments import datasets
from experiments.run import Context

__all__ = ["train_cell"]

# Draws for a point of a curve, and for the numbers at the end.
_CURVE_DRAWS, _FINAL_DRAWS = 3, 20
# Rows that curves and refinement look at; final numbers take all.
_WATCHED_ROWS = 500
# Steps of refinement: of held-out rows at a point of a curve (from where the last point left them), and at the end.
_CURVE_REFINEMENT, _FINAL_REFINEMENT = 10, 60
# From the mean of a table rows have far to go. From a guide's own output they have not, and noise grows with the rate.
_FAR_LR, _NEAR_LR = 0.1, 0.02


def train_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train one guide as the settings say; return the curve, the final bounds and errors, and what they cost."""
    data = _data(settings["dataset"], settings["num_train"], settings["data_seed"], context.data_dir, context.download)
    train, test = data.train.to(context.device), data.test.to(context.device)
    torch.manual_seed(settings["seed"])
    model, guide = _build(settings, train)
    tuning = settings["purpose"] == "tuning"
    watch = _Watch(model, guide, train, test, settings, context.progress, tuning)
    guide.setup(train[: settings["batch_size"]], torch.arange(settings["batch_size"], device=train.device))
    if not tuning:
        watch.measure(0, 0.0)
    diverged_at = None
    try:
        course = avi.fit(
            model,
            guide,
            batches=avi.minibatches(train, batch_size=settings["batch_size"], seed=settings["seed"]),
            num_steps=settings["steps"],
            elbo=TraceMeanField_ELBO(),
            compile=settings["compile"],
            seed=settings["seed"],
            progress=False,
            callbacks=[watch],
            **_optimization(settings),
        )
        seconds = course.seconds
    except avi.DivergedError as error:
        diverged_at, seconds = error.step, watch.curve["seconds"][-1] if watch.curve["seconds"] else 0.0
    # The last step may be the one too many.
    if diverged_at is None and not all(p.isfinite().all() for part in (model, guide) for p in part.parameters()):
        diverged_at = settings["steps"]
    started = time.perf_counter()
    result = {
        "status": "done" if diverged_at is None else "diverged",
        "diverged_at": diverged_at,
        "curve": watch.curve,
        "final": None,
        "refined": None,
        "parameters": _count_parameters(model, guide),
        "noise_scale": _finite(model.likelihood.scale.item()),
        "train_seconds": seconds,
        "mean_image_mse": {part: _mse(train.mean(0), rows) for part, rows in (("train", train), ("test", test))},
        "images": None,
    }
    if diverged_at is None:
        result |= _measure_tuning(model, guide, train) if tuning else _measure_final(watch, settings)
    result["evaluation_seconds"] = watch.seconds + time.perf_counter() - started
    return result


@lru_cache(maxsize=2)
def _data(name, num_train, seed, data_dir, download) -> datasets.ImageData:
    return datasets.load(name, data_dir=data_dir, num_train=num_train, seed=seed, download=download)


def _build(settings: Mapping[str, Any], train: Tensor):
    shape = tuple(train.shape[1:])
    latent_dim, hidden_dim, width = settings["latent_dim"], settings["hidden_dim"], settings["width"]
    dense = settings["architecture"] == "dense"
    leaky = partial(nn.LeakyReLU, 0.2)
    if dense:
        decoder = avi.models.DenseDecoder(latent_dim, (hidden_dim, hidden_dim), shape)
    else:
        decoder = avi.models.ConvDecoder(latent_dim, shape)
    learned = settings["noise"] == "learned"
    likelihood = avi.models.GaussianLikelihood(train.std().item() if learned else 1.0, learned=learned)
    model = avi.models.BayesianDecoder(decoder, size=len(train), likelihood=likelihood).to(train.device)
    if learned:
        # Where the noise can fall, a decoder that starts at zero is still useless when the latents have given up.
        weights = torch.cat([weight.detach().flatten() for weight in decoder.parameters()]).to(train.device)
        of_weights = {"init_loc_fn": init_to_value(values={"theta": weights}), "init_scale": 0.02}
    else:
        # As published: means at 0, log standard deviations at -2.
        of_weights = {"init_loc_fn": init_to_feasible, "init_scale": math.exp(-2)}
    common = {"global_guide": partial(avi.MeanFieldNormal, **of_weights), "init_scale": 1.0}
    if settings["guide"] == "constant":
        return model, avi.ConstantGuide(model, **common)
    if settings["guide"] == "factorized":
        # The published tables start at draws from N(0, 1), so that every row has its way to go.
        published = settings["protocol"] == "published"
        return model, avi.FactorizedGuide(
            model, init_loc_fn=init_to_sample if published else init_to_feasible, **common
        )
    if dense:
        encoder = avi.encoders.MLP(math.prod(shape), (width, width), activation=leaky)
    else:
        encoder = avi.encoders.Conv(shape[0], shape[1:], features=width, activation=leaky)
    return model, avi.AmortizedGuide(model, encoder.to(train.device), **common)


def _optimization(settings: Mapping[str, Any]) -> dict[str, Any]:
    if settings["protocol"] == "published":
        # Dense Adam for every parameter at one constant rate.
        return {"lr": settings["lr_global"], "optimizer": partial(torch.optim.Adam, fused=True)}
    steps = settings["steps"]

    def cosine(lr: float) -> Callable[[int], float]:
        return lambda step: lr * 0.5 * (1 + math.cos(math.pi * step / steps))

    return {"lr": {"local": cosine(settings["lr_local"]), "global": cosine(settings["lr_global"])}}


@dataclass
class _Watch:
    """Measures the training at steps that grow geometrically, off its clock and with draws of its own."""

    model: Any
    guide: Any
    train: Tensor
    test: Tensor
    settings: Mapping[str, Any]
    progress: Callable[[int, int, str], None]
    tuning: bool
    curve: dict[str, list] = field(
        default_factory=lambda: {name: [] for name in ("step", "seconds", "elbo", "elbo_se", "train_mse", "test_mse")}
    )
    seconds: float = 0.0
    held_out: avi.FactorizedGuide | None = None

    def __post_init__(self):
        steps = self.settings["steps"]
        # Dense where the curve bends, and at least every fifteenth of the way, so that times to tolerance are resolved.
        self.points = {round(point) for i in range(1, 16) for point in (steps ** (i / 15), steps * i / 15)}

    def __call__(self, course: avi.Fit) -> None:
        if course.steps in self.points and not self.tuning:
            self.measure(course.steps, course.seconds)
        if course.steps % 20 == 0 or course.steps == self.settings["steps"]:
            self.progress(course.steps, self.settings["steps"], "")

    def measure(self, step: int, seconds: float) -> None:
        """Add a point to the curve."""
        started = time.perf_counter()
        count = min(_WATCHED_ROWS, len(self.train))
        x, index = self.train[:count], torch.arange(count, device=self.train.device)
        held_out = self.test[:_WATCHED_ROWS]
        with _draws_of_its_own(self.train.device, step):
            bound, error = _bound(self.model, self.guide, x, index, num_samples=_CURVE_DRAWS)
            guide = self.for_held_out(held_out, _CURVE_REFINEMENT)
            point = {
                "step": step,
                "seconds": seconds,
                "elbo": bound,
                "elbo_se": error,
                "train_mse": _mse(_reconstruct(self.model, self.guide, x, index), x),
                "test_mse": _mse(_reconstruct(self.model, guide, held_out), held_out),
            }
        for name, value in point.items():
            self.curve[name].append(value)
        self.seconds += time.perf_counter() - started

    def for_held_out(self, x: Tensor, num_steps: int):
        """The guide for held-out rows: itself, or a refined one where it has parameters for its own rows only.

        None where the refinement diverges.
        """
        if not isinstance(self.guide, avi.FactorizedGuide):
            return self.guide
        start = None if self.held_out is None or len(self.held_out.table) != len(x) else self.held_out.table.detach()
        refined = _refine(self.model, self.guide, x, num_steps, _FAR_LR, start)
        if refined is not None:
            self.held_out = refined
        return refined


def _measure_tuning(model, guide, train: Tensor) -> dict[str, Any]:
    with _draws_of_its_own(train.device, 0):
        bound, error = _bound(model, guide, train, num_samples=_CURVE_DRAWS)
    part = {"elbo": bound, "elbo_se": error, "rows": len(train)}
    return {"final": {"train": part | {"mse": None}, "test": None}}


def _measure_final(watch: _Watch, settings: Mapping[str, Any]) -> dict[str, Any]:
    model, guide, train, test = watch.model, watch.guide, watch.train, watch.test
    source = {
        "constant": "same for every row",
        "amortized": "encoder",
        "factorized": "refined, globals frozen",
    }[settings["guide"]]
    with _draws_of_its_own(train.device, settings["steps"] + 1):
        bound, error = _bound(model, guide, train, num_samples=_FINAL_DRAWS)
        for_test = watch.for_held_out(test, _FINAL_REFINEMENT)
        held_out = _local(model, for_test, test)
        final = {
            "train": {
                "elbo": bound,
                "elbo_se": error,
                "mse": _mse(_reconstruct(model, guide, train), train),
                "rows": len(train),
            },
            "test": {**held_out, "mse": _mse(_reconstruct(model, for_test, test), test), "source": source},
        }
        originals = test[:5]
        # Reconstructed among all held-out rows: a factorized guide answers for its rows together.
        reconstructions = _reconstruct(model, for_test, test)[:5]
        refined = None
        if settings["guide"] != "factorized":
            refined = {
                part: _gain(model, guide, rows[:_WATCHED_ROWS]) for part, rows in (("train", train), ("test", test))
            }
    images = None
    if reconstructions.isfinite().all():
        images = {
            "shape": list(train.shape[1:]),
            "originals": [[round(v, 3) for v in image.flatten().tolist()] for image in originals],
            "reconstructions": [[round(v, 3) for v in image.flatten().tolist()] for image in reconstructions],
        }
    return {"final": final, "refined": refined, "images": images}


def _refine(
    model, guide, x: Tensor, num_steps: int, lr: float, start: Tensor | None = None
) -> avi.FactorizedGuide | None:
    """The refined guide, None where its training diverges: that is no divergence of the guide's own training."""
    try:
        return avi.refine(model, guide, x, num_steps=num_steps, lr=lr, start=start)
    except avi.DivergedError:
        return None


def _bound(model, guide, *args: Tensor, num_samples: int) -> tuple[float | None, float | None]:
    """The bound in nats a row of all rows, and its standard error; None where training has left all numbers."""
    weights = avi.log_weights(model, guide, *args, num_samples=num_samples)
    if not weights.total.isfinite().all():
        return None, None
    bound, count = avi.elbo(weights), len(args[0]) * weights.scale
    return bound.value / count, _finite(bound.se / count)


def _local(model, guide, x: Tensor) -> dict[str, Any]:
    """The local part of the bound for the rows of ``x``, nats a row, and its standard error over draws."""
    if guide is None:
        return {"elbo": None, "elbo_se": None, "rows": len(x)}
    by_draw = avi.log_weights(model, guide, x, num_samples=_FINAL_DRAWS).local.mean(1)
    return {
        "elbo": _finite(by_draw.mean().item()),
        "elbo_se": _finite(by_draw.std().item() / len(by_draw) ** 0.5),
        "rows": len(x),
    }


def _gain(model, guide, x: Tensor) -> dict[str, Any]:
    """What rows gain by refinement from the guide's own output, globals frozen: their amortization gap."""
    refined = _refine(model, guide, x, _FINAL_REFINEMENT, _NEAR_LR)
    before, after = _local(model, guide, x), _local(model, refined, x)
    if before["elbo"] is None or after["elbo"] is None:
        return after | {"gain": None, "gain_se": None}
    gain_se = math.hypot(before["elbo_se"], after["elbo_se"])
    return after | {"gain": after["elbo"] - before["elbo"], "gain_se": gain_se}


@torch.no_grad()
def _reconstruct(model, guide, x: Tensor, index: Tensor | None = None) -> Tensor:
    """The mean image at the posterior means of the row's latents and of the decoder's weights."""
    if guide is None:
        return torch.full_like(x, math.nan)
    conditioned = poutine.condition(model, data=guide.median(x, index))
    return poutine.trace(conditioned).get_trace(x, index).nodes["x"]["fn"].mean


def _count_parameters(model, guide) -> dict[str, int]:
    of_guide = sum(parameter.numel() for parameter in guide.parameters())
    local = sum(parameter.numel() for parameter in guide.local_parameters())
    return {"local": local, "global": of_guide - local, "model": sum(p.numel() for p in model.parameters())}


@contextmanager
def _draws_of_its_own(device: torch.device, seed: int):
    # A training that diverges is measured too, as None: Pyro's validation would raise instead.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        yield


def _mse(images: Tensor, x: Tensor) -> float | None:
    return _finite((images - x).square().mean().item())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
