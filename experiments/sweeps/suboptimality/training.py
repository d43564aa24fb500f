"""The variational autoencoder of the sweep `suboptimality`: its binary images, its parts, its training."""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

import pyro_avi as avi
from experiments import datasets
from experiments.runner.run_cell import Context

__all__ = ["FAMILIES", "RICHER", "binary_images", "build", "train"]

#: Families by the name that settings have for them.
FAMILIES: dict[str, Callable[[], avi.Family]] = {
    "diagonal": avi.DiagonalNormal,
    "full": avi.MultivariateNormal,
    "flow": avi.Flow,
}

#: Richer families for the rows' own factors: a row's flow shares no weights with others.
RICHER: dict[str, Callable[[], avi.Family]] = {"full": avi.MultivariateNormal, "flow": avi.RowFlow}

# The published rate: 10^(-i / 7) of the first one during 3^i epochs, i = 0 to 7, 3,280 epochs in all.
_STAGES = 8
# Steps between two times that a training is written, from where it goes on.
_EVERY = 2000


@lru_cache(maxsize=2)
def binary_images(
    name: str, num_train: int | None, seed: int, data_dir: str | None, download: bool
) -> tuple[Tensor, Tensor]:
    """Training and test images of zeros and ones, each pixel drawn once with its grey value as the probability.

    Args:
        name, num_train, data_dir, download: as in :func:`experiments.datasets.load`.
        seed: of the subset and of the pixels.

    >>> train, test = binary_images("digits", None, 0, None, False)
    >>> train.shape, sorted(train.unique().tolist())
    (torch.Size([1437, 1, 8, 8]), [0.0, 1.0])
    """
    data = datasets.load(name, data_dir=data_dir, num_train=num_train, seed=seed, download=download)
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(data.train, generator=generator), torch.bernoulli(data.test, generator=generator)


def build(settings: Mapping[str, Any], x: Tensor) -> tuple[avi.models.VAE, avi.AmortizedGuide]:
    """The untrained model of the rows ``x [N, 1, H, W]`` and its guide, drawn from torch's random state."""
    shape, hidden, width = tuple(x.shape[1:]), settings["hidden_dim"], settings["encoder_dim"]
    decoder = avi.models.DenseDecoder(settings["latent_dim"], (hidden, hidden), shape, activation=nn.ELU)
    model = avi.models.VAE(decoder, size=len(x), likelihood=avi.models.BernoulliLikelihood()).to(x.device)
    if settings["encoder"] == "conv":
        encoder = avi.encoders.Conv(shape[0], shape[1:], features=width, activation=nn.ELU)
    else:
        encoder = avi.encoders.MLP(math.prod(shape), (width, width), activation=nn.ELU)
    guide = avi.AmortizedGuide(model, encoder.to(x.device), family=FAMILIES[settings["family"]]())
    return model, guide.setup(x[: settings["batch_size"]], torch.arange(settings["batch_size"], device=x.device))


def train(model: nn.Module, guide: nn.Module, x: Tensor, settings: Mapping[str, Any], context: Context) -> avi.Fit:
    """Train both on the rows ``x``, with the published learning rate and the KL divergence's weight rising to 1.

    Raises:
        avi.DivergedError: if the loss is no longer finite.
    """
    steps, warm_up = settings["steps"], settings["warm_up"]
    weight = torch.ones((), device=x.device)

    def follow(fit: avi.Fit) -> None:
        # The next step's. The first one has it from below.
        weight.fill_(min(1.0, (fit.steps + 1) / max(1, warm_up)))
        if fit.steps % 20 == 0 or fit.steps == steps:
            context.progress(fit.steps, steps, "training")

    weight.fill_(1 / max(1, warm_up))
    last_batch = settings.get("last_batch", "keep")
    return avi.fit(
        _LatentsWeighted(model, weight),
        _LatentsWeighted(guide, weight),
        batches=avi.minibatches(x, batch_size=settings["batch_size"], last_batch=last_batch, seed=settings["seed"]),
        num_steps=steps,
        lr=lambda step: learning_rate(step, steps, first=settings["lr"]),
        elbo=TraceMeanField_ELBO(),
        compile=settings["compile"],
        seed=settings["seed"],
        progress=False,
        callbacks=[follow],
        checkpoint=context.scratch.checkpoint("training"),
        every=_EVERY,
    )


def learning_rate(step: int, steps: int, *, first: float) -> float:
    """The published schedule, its 3,280 epochs stretched to ``steps`` steps.

    >>> [round(learning_rate(step, 3280, first=0.001), 6) for step in (0, 1, 3, 4, 3279)]
    [0.001, 0.00072, 0.00072, 0.000518, 0.0001]
    """
    epochs = (3**_STAGES - 1) / 2
    stage = math.floor(math.log(2 * epochs * step / steps + 1, 3) + 1e-9)
    return first * 10 ** (-stage / (_STAGES - 1))


class _LatentsWeighted(nn.Module):
    """A program whose latents' log densities count with a weight, so that model and guide together weigh the KL divergence.

    Args:
        program: a model or guide that is a module.
        weight: ``[]``, read at every call, so that it may change while a compiled step does not.
    """

    def __init__(self, program: nn.Module, weight: Tensor):
        super().__init__()
        self.program = program
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, *args, **kwargs):
        with _Weigh(self.weight):
            return self.program(*args, **kwargs)


class _Weigh(Messenger):
    """Scales the log density of every latent. `poutine.scale` would scale that of the observations too."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
