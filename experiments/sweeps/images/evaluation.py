"""What is measured of a cell of the sweep `images`: on the way of its training, and at the end."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

import pyro_avi as avi
from experiments.sweeps.images.rounds import SHARE, Rounds, convergence, has_fallen

__all__ = [
    "CURVE_DRAWS",
    "TOLD_EVERY",
    "Watch",
    "all_finite",
    "bound",
    "count_parameters",
    "draws_of_its_own",
    "finite",
    "measure_final",
    "mse",
    "of_training_rows",
]

#: Draws for a bound on the way: a point of a curve, a trial of learning rates.
CURVE_DRAWS = 3
#: Steps between two times that a training tells how far it is.
TOLD_EVERY = 20
# For the numbers at the end.
_FINAL_DRAWS = 20
# Rows that curves and refinement look at; final numbers take all.
_WATCHED_ROWS = 500
# Steps of refinement: of held-out rows at a point of a curve (from where the last point left them), and at the end.
_CURVE_REFINEMENT, _FINAL_REFINEMENT = 10, 60
# What of a watch changes during a training.
_STATE = ("curve", "seconds", "held_out", "fell")


@dataclass
class Watch:
    """Measures the training at steps that grow geometrically, off its clock and with draws of its own."""

    model: Any
    guide: Any
    train: Tensor
    test: Tensor
    settings: Mapping[str, Any]
    progress: Callable[[int, int, str], None]
    curve: dict[str, list] = field(
        default_factory=lambda: {name: [] for name in ("step", "seconds", "elbo", "elbo_se", "train_mse", "test_mse")}
    )
    # The seconds of attempts before, and those that measuring took.
    began: float = 0.0
    seconds: float = 0.0
    # The table of held-out rows that were refined, from which they go on.
    held_out: Tensor | None = None
    rounds: Rounds | None = None
    fell: bool = False
    # What was gained by the training that this one goes on from.
    before: float | None = 0.0

    def __post_init__(self):
        steps = self.settings["steps"]
        if self.settings["protocol"] == "fair":
            self.rounds = Rounds.doubling(steps)
            self.points = self.rounds.points()
        else:
            # Dense where the curve bends, and at least every fifteenth of the way, so that times to tolerance are resolved;
            # half way, as what the last half of the steps gains tells whether they are enough.
            self.points = {round(point) for i in range(1, 16) for point in (steps ** (i / 15), steps * i / 15)}
            self.points.add(steps // 2)

    def __call__(self, fit: avi.Fit) -> bool:
        """Whether the training is over: it has converged, or lost what it had gained."""
        steps, most = fit.steps, self.settings["steps"]
        if steps in self.points:
            self.measure(steps, fit.seconds)
        over = False
        if self.rounds is not None and steps in self.rounds.ends[1:]:
            found = self.convergence()
            self.fell = has_fallen(found)
            over = found["converged"] or self.fell
        if steps % TOLD_EVERY == 0 or steps == most or over:
            self.progress(most if over else steps, most, "")
        return over

    def next_call(self, steps: int) -> int:
        """After how many steps in all there is something to measure or to tell."""
        ends = self.rounds.ends if self.rounds is not None else ()
        told = steps + TOLD_EVERY - steps % TOLD_EVERY
        return min(step for step in (*self.points, *ends, told) if step > steps)

    def state_dict(self) -> dict[str, Any]:
        """What a training that is resumed goes on to watch from."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name in _STATE:
            setattr(self, name, state[name])

    def convergence(self) -> dict[str, Any]:
        return convergence(self.curve, self.settings.get("share", SHARE), self.before)

    def measure(self, step: int, seconds: float) -> None:
        """Add a point to the curve."""
        started = time.perf_counter()
        count = min(_WATCHED_ROWS, len(self.train))
        x, index = self.train[:count], torch.arange(count, device=self.train.device)
        held_out = self.test[:_WATCHED_ROWS]
        with draws_of_its_own(self.train.device, step):
            elbo, error = bound(self.model, self.guide, x, index, num_samples=CURVE_DRAWS)
            # Points between which rows go on from where they were take few steps; ends of rounds are few and far between.
            num_steps = _CURVE_REFINEMENT if self.rounds is None else _FINAL_REFINEMENT
            guide = self.for_held_out(held_out, num_steps) if self._looks_at_held_out(step) else None
            point = {
                "step": step,
                "seconds": self.began + seconds,
                "elbo": elbo,
                "elbo_se": error,
                "train_mse": mse(_reconstruct(self.model, self.guide, x, index), x),
                "test_mse": mse(_reconstruct(self.model, guide, held_out), held_out),
            }
        for name, value in point.items():
            self.curve[name].append(value)
        self.seconds += time.perf_counter() - started

    def _looks_at_held_out(self, step: int) -> bool:
        """Whether held-out rows are looked at: refining them takes longer than many steps, so it waits for ends of rounds."""
        return self.rounds is None or not isinstance(self.guide, avi.FactorizedGuide) or step in self.rounds.ends

    def for_held_out(self, x: Tensor, num_steps: int):
        """The guide for held-out rows: itself, or a refined one where it has parameters for its own rows only.

        None where the refinement diverges.
        """
        if not isinstance(self.guide, avi.FactorizedGuide):
            return self.guide
        start = None if self.held_out is None or len(self.held_out) != len(x) else self.held_out
        refined = _refine(self.model, self.guide, x, num_steps, start)
        if refined is not None:
            self.held_out = refined.table.detach()
        return refined


def measure_final(watch: Watch, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds and errors at the end on all rows, what refinement gains, and some reconstructed images."""
    model, guide, train, test = watch.model, watch.guide, watch.train, watch.test
    source = {
        "constant": "same for every row",
        "amortized": "encoder",
        "factorized": "refined, globals frozen",
    }[settings["guide"]]
    with draws_of_its_own(train.device, settings["steps"] + 1):
        at_training_rows = of_training_rows(model, guide, train)
        for_test = watch.for_held_out(test, _FINAL_REFINEMENT)
        held_out = _local(model, for_test, test)
        final = {
            "train": at_training_rows,
            "test": {**held_out, "mse": mse(_reconstruct(model, for_test, test), test), "source": source},
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


def of_training_rows(model, guide, train: Tensor) -> dict[str, Any]:
    """The bound of all training rows, its standard error, and the error of their reconstruction."""
    elbo, error = bound(model, guide, train, num_samples=_FINAL_DRAWS)
    error_of_mean = mse(_reconstruct(model, guide, train), train)
    return {"elbo": elbo, "elbo_se": error, "mse": error_of_mean, "rows": len(train)}


def _refine(model, guide, x: Tensor, num_steps: int, start: Tensor | None = None) -> avi.FactorizedGuide | None:
    """The refined guide, None where its training diverges: that is no divergence of the guide's own training."""
    try:
        return avi.refine(model, guide, x, num_steps=num_steps, start=start, progress=False)
    except avi.DivergedError:
        return None


def bound(model, guide, *args: Tensor, num_samples: int) -> tuple[float | None, float | None]:
    """The bound in nats a row of all rows, and its standard error; None where training has left all numbers."""
    weights = avi.log_weights(model, guide, *args, num_samples=num_samples, seed=None, progress=False)
    if not weights.total.isfinite().all():
        return None, None
    mean = avi.elbo(weights).per_row
    return mean.value, finite(mean.se)


def _local(model, guide, x: Tensor) -> dict[str, Any]:
    """The local part of the bound for the rows of ``x``, nats a row, and its standard error over draws."""
    if guide is None:
        return {"elbo": None, "elbo_se": None, "rows": len(x)}
    by_draw = avi.log_weights(model, guide, x, num_samples=_FINAL_DRAWS, seed=None, progress=False).local.mean(1)
    return {
        "elbo": finite(by_draw.mean().item()),
        "elbo_se": finite(by_draw.std().item() / len(by_draw) ** 0.5),
        "rows": len(x),
    }


def _gain(model, guide, x: Tensor) -> dict[str, Any]:
    """What rows gain by refinement from the guide's own output, globals frozen: their amortization gap."""
    refined = _refine(model, guide, x, _FINAL_REFINEMENT)
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


def count_parameters(model, guide) -> dict[str, int]:
    """The parameters of the inference function, of the factor of the globals, and of the model."""
    of_guide = sum(parameter.numel() for parameter in guide.parameters())
    local = sum(parameter.numel() for parameter in guide.local_parameters())
    return {"local": local, "global": of_guide - local, "model": sum(p.numel() for p in model.parameters())}


def all_finite(model, guide) -> bool:
    """Whether training has left numbers: its last step may be the one too many."""
    return all(parameter.isfinite().all() for part in (model, guide) for parameter in part.parameters())


@contextmanager
def draws_of_its_own(device: torch.device, seed: int):
    """A context whose draws are those of this seed, and change no others."""
    # A training that diverges is measured too, as None: Pyro's validation would raise instead.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        yield


def mse(images: Tensor, x: Tensor) -> float | None:
    """The mean squared error a pixel, None where it is not finite."""
    return finite((images - x).square().mean().item())


def finite(value: float) -> float | None:
    """The value, None where it is not finite: JSON has no other name for that."""
    return value if math.isfinite(value) else None
