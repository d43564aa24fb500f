"""The cells of the sweep `gradients` that train: an autoencoder of binary images, by one estimator."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

import pyro_avi as avi
from experiments import datasets
from experiments.runner.run_cell import Context

__all__ = ["train"]

# Evaluations of the bound on the test rows in a training, and draws of each.
_EVALUATIONS, _DRAWS = 20, 10


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
    if settings["latents"] == "binary":
        model: Any = avi.models.SigmoidBelief(decoder, size=len(rows))
    else:
        model = avi.models.VAE(decoder, size=len(rows), likelihood=avi.models.BernoulliLikelihood())
    guide = avi.AmortizedGuide(model, encoder=settings["widths"][::-1], init_scale=0.5)
    size = settings["batch_size"]
    return model, guide.setup(rows[:size], torch.arange(size))


def train(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """The ELBO of test rows, in nats a row, by steps and by seconds of the processor."""
    images = datasets.load(settings["dataset"], data_dir=context.data_dir, download=context.download)
    # Whole batches: an average by the position of a row in the batch needs them.
    size = settings["batch_size"]
    train, test = (torch.as_tensor(part).gt(0.5).float() for part in (images.train, images.test))
    train, test = train[: len(train) // size * size], test[:500]
    model, guide = _model_and_guide(settings, train)
    curve: list[dict[str, float]] = []
    every, evaluating, began = max(1, settings["steps"] // _EVALUATIONS), 0.0, time.process_time()

    diverged_at = None

    def evaluate(fit: avi.Fit) -> bool:
        nonlocal evaluating, began, diverged_at
        started = time.process_time()
        if fit.steps == 1:
            # What the first step of a process sets up is no estimator's.
            began = started
        if fit.steps % every:
            return False
        # What is no number shows in the weights, as in a loss.
        with pyro.validation_enabled(False):
            weights = avi.log_weights(model, guide, test, num_samples=_DRAWS, seed=1, progress=False)
        if not weights.local.isfinite().all():
            diverged_at = fit.steps
            return True
        bound = avi.elbo(weights).per_row
        curve.append({"step": fit.steps, "seconds": started - began - evaluating, "elbo": bound.value, "se": bound.se})
        evaluating += time.process_time() - started
        context.progress(fit.steps, settings["steps"], f"ELBO {bound.value:.1f}")
        return False

    try:
        avi.fit(
            model,
            guide,
            batches=avi.minibatches(train, batch_size=size, seed=settings["seed"]),
            num_steps=settings["steps"],
            lr=settings["lr"],
            elbo=_elbos(settings["num_particles"])[settings["estimator"]](),
            # All steps eager: the times of those that can be compiled would tell of that.
            compile=False,
            callbacks=[evaluate],
            seed=settings["seed"],
            progress=False,
        )
    except avi.DivergedError as error:
        diverged_at = error.step
    return {"curve": curve, "diverged_at": diverged_at}
