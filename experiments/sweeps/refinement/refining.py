"""One cell of the sweep `refinement`: train a variational autoencoder, then refine its test rows with the decoder fixed."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_avi as avi
from experiments import datasets
from experiments.runner.run_cell import Context
from experiments.sweeps.refinement.cells import BATCH

__all__ = ["STARTS", "STEPS", "measure_cell"]

#: Where the factors of rows start: at the encoder's output, at the prior, and where a table is initialised.
STARTS = ("encoder", "prior", "scratch")
#: Steps of refinement.
STEPS = (0, 1, 5, 20, 100)
# Steps by which the best factors are looked for; draws by which bounds are compared, the same for all.
_BEST, _DRAWS = 400, 100
_LR = 1e-3


def measure_cell(settings: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Train as the settings say, and refine the first test rows."""
    data = datasets.load(settings["dataset"], data_dir=context.data_dir, download=context.download)
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.bernoulli(part, generator=generator).to(context.device) for part in (data.train, data.test))
    torch.manual_seed(settings["seed"])
    model, guide, seconds = _train(train, settings, context)
    x = test[: settings["rows"]]
    return {"status": "done", "training_seconds": seconds, **_refine(model, guide, x, settings["seed"])}


def _train(
    x: Tensor, settings: Mapping[str, Any], context: Context
) -> tuple[avi.models.VAE, avi.AmortizedGuide, float]:
    shape, hidden, steps = tuple(x.shape[1:]), settings["hidden_dim"], settings["training_steps"]
    decoder = avi.models.DenseDecoder(settings["latent_dim"], (hidden, hidden), shape, activation=nn.ELU)
    model = avi.models.VAE(decoder, size=len(x), likelihood=avi.models.BernoulliLikelihood()).to(x.device)
    encoder = avi.encoders.MLP(math.prod(shape), (hidden, hidden), activation=nn.ELU).to(x.device)
    guide = avi.AmortizedGuide(model, encoder).setup(x[:BATCH], torch.arange(BATCH, device=x.device))
    fit = avi.fit(
        model,
        guide,
        batches=avi.minibatches(
            x, batch_size=BATCH, last_batch=settings.get("last_batch", "keep"), seed=settings["seed"]
        ),
        num_steps=steps,
        lr=_LR,
        elbo=TraceMeanField_ELBO(),
        seed=settings["seed"],
        progress=False,
        callbacks=[lambda fit: context.progress(fit.steps, steps, "training") if fit.steps % 100 == 0 else None],
    )
    return model, guide, fit.seconds


def _refine(model: avi.models.VAE, guide: avi.AmortizedGuide, x: Tensor, seed: int) -> dict[str, Any]:
    """The bounds of rows after steps of refinement, in nats a row, and the processor seconds that these took."""
    starts = dict(zip(STARTS, _starts(model, guide, x), strict=True))
    encoded = _bounds(model, guide, x, seed)
    best = _bounds(model, avi.refine(model, guide, x, num_steps=_BEST, seed=seed + 1, progress=False), x, seed)
    lines = []
    for start, table in starts.items():
        for steps in STEPS:
            options = {"start": table, "seed": seed + 2, "progress": False}
            # A step of length zero gives the start itself.
            options |= {"num_steps": steps} if steps else {"num_steps": 1, "lr": 0.0}
            began = time.process_time()
            refined = avi.refine(model, guide, x, **options)
            seconds = time.process_time() - began
            bounds = _bounds(model, refined, x, seed)
            short = best - bounds
            lines.append(
                {
                    "start": start,
                    "steps": steps,
                    "seconds": seconds if steps else 0.0,
                    "elbo": bounds.mean().item(),
                    "short": short.mean().item(),
                    "short_se": short.std().item() / len(x) ** 0.5,
                }
            )
    gap = best - encoded
    return {"gap": gap.mean().item(), "gap_se": gap.std().item() / len(x) ** 0.5, "lines": lines}


def _starts(model: avi.models.VAE, guide: avi.AmortizedGuide, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        encoded = guide.variational_parameters(x)
        scratch = avi.FactorizedGuide(model, same_rows=True).setup(x).table
    return encoded, torch.zeros_like(encoded), scratch.detach()


def _bounds(model: avi.models.VAE, guide: nn.Module, x: Tensor, seed: int) -> Tensor:
    """``[N]`` by the same draws for all guides, moved and stretched, so that most of their noise cancels in differences."""
    return avi.log_weights(model, guide, x, num_samples=_DRAWS, seed=seed, progress=False).local.mean(0)
