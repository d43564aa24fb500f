"""The cells of the sweep `gradients` that train an autoencoder of binary images by one estimator, or try rates for that."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_avi as avi
from experiments import datasets
from experiments.runner.run_cell import Context, Progress
from experiments.sweeps.gradients.cells import best_rate

__all__ = ["next_rate", "train", "try_rates"]

# Evaluations of the bound in a training, the rows that it is evaluated on, and draws of each.
_EVALUATIONS, _ROWS, _DRAWS = 10, 500, 10
# Of a training that ends by seconds.
_MOST_STEPS = 1_000_000


def _elbos(num_particles: int) -> dict[str, Callable[[], ELBO]]:
    several = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    return {
        "pathwise": Trace_ELBO,
        "sticking_the_landing": avi.StickingTheLandingELBO,
        "closed_form_kl": TraceMeanField_ELBO,
        "score_function": avi.ScoreFunctionELBO,
        "decaying_baseline": lambda: avi.RaoBlackwellizedELBO("average", continuous=True),
        "learned_baseline": lambda: avi.RaoBlackwellizedELBO("learned", continuous=True),
        "leave_one_out": lambda: avi.LeaveOneOutELBO(continuous=True, **several),
        "vimco": lambda: avi.VimcoELBO(continuous=True, **several),
        "enumeration": lambda: avi.EnumeratedELBO(max_plate_nesting=1),
        "gumbel_softmax": lambda: avi.RelaxedELBO(0.5),
        "straight_through": lambda: avi.RelaxedELBO(0.5, straight_through=True),
    }


def _model_and_guide(settings: Mapping[str, Any], rows: Tensor) -> tuple[Callable, avi.AmortizedGuide]:
    torch.manual_seed(settings["seed"])
    decoder = avi.models.DenseDecoder(settings["latent_dim"], settings["widths"], rows.shape[1:])
    _start_at_the_mean_image(decoder, rows)
    if settings["latents"] == "binary":
        model: Any = avi.models.SigmoidBelief(decoder, size=len(rows))
    else:
        model = avi.models.VAE(decoder, size=len(rows), likelihood=avi.models.BernoulliLikelihood())
    guide = avi.AmortizedGuide(model, encoder=settings["widths"][::-1], init_scale=0.5)
    size = settings["batch_size"]
    return model, guide.setup(rows[:size], torch.arange(size))


def _start_at_the_mean_image(decoder: avi.models.DenseDecoder, rows: Tensor) -> None:
    """Set the last biases to the log odds of the pixels' shares, by Laplace's rule, as the code of Burda et al. (2016) does.

    From zero they learn these first, and on the way the weights that pass binary latents on come to nothing in most seeds:
    what is then compared is who leaves the mean image, and not whose gradient is better.
    """
    share = (rows.sum(0) + 1) / (len(rows) + 2)
    (*_, last) = (layer for layer in decoder.layers if isinstance(layer, torch.nn.Linear))
    with torch.no_grad():
        last.bias.copy_(share.logit().flatten())


def train(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The ELBO of test rows, in nats a row, by steps and by seconds of the processor."""
    rows, test = _images(settings, context)
    return _train(settings, rows, test, _EVALUATIONS, context.progress)


def try_rates(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The ELBO of training rows after a short training at each rate, and beyond them while the best is on their edge."""
    rows, _ = _images(settings, context)
    trials: list[dict[str, Any]] = []
    waiting = list(settings["rates"])
    while waiting:
        lr = waiting.pop(0)
        found = _train({**settings, "lr": lr}, rows, rows[:_ROWS], 1, context.progress)
        elbo = found["curve"][-1]["elbo"] if found["diverged_at"] is None else None
        trials.append({"lr": lr, "elbo": elbo, "diverged_at": found["diverged_at"]})
        if not waiting:
            waiting = next_rate(trials, settings["ladder"])
    return {"trials": trials}


def next_rate(trials: Sequence[Mapping[str, Any]], ladder: Sequence[float]) -> list[float]:
    """The rate to try next, where the best of those tried is the least or the largest of them; else none.

    Args:
        trials: with ``lr`` and ``elbo``, which is ``None`` where it diverged.
        ladder: all rates that may be tried, increasing.

    Example:
        >>> next_rate([{"lr": 1, "elbo": -3.0}, {"lr": 2, "elbo": -2.0}], (1, 2, 4))
        [4]
        >>> next_rate([{"lr": 1, "elbo": -3.0}, {"lr": 2, "elbo": -2.0}, {"lr": 4, "elbo": None}], (1, 2, 4))
        []
    """
    best, tried = best_rate(trials), [trial["lr"] for trial in trials]
    if best == max(tried):
        return [lr for lr in ladder if lr > best][:1]
    if best == min(tried):
        return [lr for lr in ladder if lr < best][-1:]
    return []


def _images(settings: Mapping[str, Any], context: Context) -> tuple[Tensor, Tensor]:
    """Binary images: all training rows that make whole batches, and some test rows."""
    train, test = _read(settings["dataset"], context.data_dir, context.download)
    # An average by the position of a row in the batch needs whole ones.
    size = settings["batch_size"]
    return train[: len(train) // size * size], test[:_ROWS]


@lru_cache(maxsize=1)
def _read(name: str, data_dir: str | None, download: bool) -> tuple[Tensor, Tensor]:
    images = datasets.load(name, data_dir=data_dir, download=download)
    train, test = (torch.as_tensor(part).gt(0.5).float() for part in (images.train, images.test))
    return train, test


def _train(
    settings: Mapping[str, Any], rows: Tensor, evaluated: Tensor, evaluations: int, progress: Progress
) -> dict[str, Any]:
    # Pyro keeps the averages of baselines there by the names of latents, which all trainings share.
    pyro.clear_param_store()
    model, guide = _model_and_guide(settings, rows)
    curve = _Curve(model, guide, evaluated, settings, evaluations, progress)
    try:
        avi.fit(
            model,
            guide,
            batches=avi.minibatches(rows, batch_size=settings["batch_size"], seed=settings["seed"]),
            num_steps=settings.get("steps", _MOST_STEPS),
            lr=settings["lr"],
            elbo=_elbos(settings["num_particles"])[settings["estimator"]](),
            # All steps eager: the times of those that can be compiled would tell of that.
            compile=False,
            callbacks=[curve],
            seed=settings["seed"],
            progress=False,
        )
    except avi.DivergedError as error:
        curve.diverged_at = error.step
    return {"curve": curve.points, "diverged_at": curve.diverged_at}


@dataclass
class _Curve:
    """A callback that evaluates the bound at equal distances of steps or of seconds, and ends a training of so many seconds.

    Seconds are those of the processor that this thread has spent since the first step, without the evaluations.
    """

    model: Callable
    guide: Callable
    rows: Tensor
    settings: Mapping[str, Any]
    evaluations: int
    progress: Progress
    points: list[dict[str, float]] = field(default_factory=list)
    diverged_at: int | None = None
    _began: float = 0.0

    def __call__(self, fit: avi.Fit) -> bool:
        now = time.thread_time()
        if fit.steps == 1:
            # What the first step of a process sets up is no estimator's.
            self._began = now
        spent = now - self._began
        if not self._is_due(fit.steps, spent):
            return False
        # What is no number shows in the weights, as in a loss.
        with pyro.validation_enabled(False):
            weights = avi.log_weights(self.model, self.guide, self.rows, num_samples=_DRAWS, seed=1, progress=False)
        if not weights.local.isfinite().all():
            self.diverged_at = fit.steps
            return True
        bound = avi.elbo(weights).per_row
        self.points.append({"step": fit.steps, "seconds": spent, "elbo": bound.value, "se": bound.se})
        self.progress(len(self.points), self.evaluations, f"ELBO {bound.value:.1f}")
        self._began += time.thread_time() - now
        return "seconds" in self.settings and len(self.points) == self.evaluations

    def _is_due(self, steps: int, spent: float) -> bool:
        if "seconds" in self.settings:
            return spent >= (len(self.points) + 1) * self.settings["seconds"] / self.evaluations
        return steps % max(1, self.settings["steps"] // self.evaluations) == 0
