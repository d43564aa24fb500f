"""Model, guide and optimization of a cell of the sweep `images`, as its settings say."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_sample, init_to_value
from torch import Tensor, nn

import pyro_avi as avi
from experiments import datasets
from experiments.runner.run_cell import Context
from experiments.sweeps.images.rounds import Rounds

__all__ = ["EVERY", "as_factorized", "build", "fit_cell", "load"]

#: Steps between two times that a training is written, from where it goes on.
EVERY = 2000


def load(settings: Mapping[str, Any], context: Context) -> tuple[Tensor, Tensor]:
    """Training and test images of a cell, on the context's device."""
    data = _data(settings["dataset"], settings["num_train"], settings["data_seed"], context.data_dir, context.download)
    return data.train.to(context.device), data.test.to(context.device)


@lru_cache(maxsize=2)
def _data(name, num_train, seed, data_dir, download) -> datasets.ImageData:
    return datasets.load(name, data_dir=data_dir, num_train=num_train, seed=seed, download=download)


def build(settings: Mapping[str, Any], train: Tensor):
    """Model and guide of a cell for the rows ``train``, drawn from torch's random state by the cell's seed."""
    torch.manual_seed(settings["seed"])
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
        guide = avi.ConstantGuide(model, **common)
    elif settings["guide"] == "factorized":
        # The published tables start at draws from N(0, 1), so that every row has its way to go.
        published = settings["protocol"] == "published"
        guide = avi.FactorizedGuide(model, init_loc_fn=init_to_sample if published else init_to_feasible, **common)
    else:
        if dense:
            encoder = avi.encoders.MLP(math.prod(shape), (width, width), activation=leaky)
        else:
            encoder = avi.encoders.Conv(shape[0], shape[1:], features=width, activation=leaky)
        guide = avi.AmortizedGuide(model, encoder.to(train.device), **common)
    rows = settings["batch_size"]
    return model, guide.setup(train[:rows], torch.arange(rows, device=train.device))


def as_factorized(guide: avi.AmortizedGuide, model, train: Tensor) -> avi.FactorizedGuide:
    """F-VI at the very factors of an amortized guide: its outputs as a table, and its factor of the decoder's weights."""
    table = avi.FactorizedGuide(model, global_guide=guide.global_guide, init_scale=1.0)
    index = torch.arange(len(train), device=train.device)
    table.setup(train, index)
    with torch.no_grad():
        table.table.copy_(guide.variational_parameters(train, index))
    return table


def fit_cell(
    model,
    guide,
    train: Tensor,
    settings: Mapping[str, Any],
    rounds: Rounds | None,
    callback: Callable[[avi.Fit], Any],
    checkpoint: Path | None = None,
) -> avi.Fit:
    """Train as the cell's settings say, in rounds or, for the published protocol, at one rate; on from the checkpoint."""
    last_batch = settings.get("last_batch", "keep")
    return avi.fit(
        model,
        guide,
        batches=avi.minibatches(train, batch_size=settings["batch_size"], last_batch=last_batch, seed=settings["seed"]),
        num_steps=settings["steps"],
        elbo=TraceMeanField_ELBO(),
        compile=settings["compile"],
        seed=settings["seed"],
        progress=False,
        callbacks=[callback],
        checkpoint=checkpoint,
        every=EVERY,
        **_optimization(settings, rounds),
    )


def _optimization(settings: Mapping[str, Any], rounds: Rounds | None) -> dict[str, Any]:
    """What the cell's protocol gives to `pyro_avi.fit`: learning rates, and the optimizer where it is not the default."""
    if rounds is None:
        # As published: Adam for every parameter at one constant rate, also for rows of a table that are not in the batch.
        by_row = settings["guide"] == "factorized" and settings["batch_size"] < settings["num_train"]
        dense = {"optimizer": partial(torch.optim.Adam, fused=True)} if by_row else {}
        return {"lr": settings["lr_global"], **dense}

    def falling(lr: float) -> Callable[[int], float]:
        return lambda step: lr * rounds.share_of_rate(step)

    return {"lr": {"local": falling(settings["lr_local"]), "global": falling(settings["lr_global"])}}
