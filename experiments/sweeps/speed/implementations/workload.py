"""What every implementation trains: a decoder of rows like images, its sizes, its data and its minibatches."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import pyro_avi as avi

__all__ = ["LR", "Workload"]

#: Adam's learning rate.
LR = 1e-3


class Workload:
    """What is trained: z_n ~ N(0, I), theta ~ N(0, I), x_n ~ N(decoder(z_n; theta), 1).

    Args:
        settings: of a cell of the sweep ``speed``.
        device: where its data are, and what is trained.
    """

    def __init__(self, settings: Mapping[str, Any], device: str = "cpu"):
        self.device = device
        self.size, self.batch = settings["num_rows"], settings["batch_size"]
        self.kind, self.width = settings["guide"], settings["width"]
        self.latent_dim = settings["latent_dim"]
        self.layers, self.num_pixels = tuple(settings["layers"]), settings["pixels"]
        torch.manual_seed(settings["seed"])
        self.made = settings["made"]
        # Rows that are made as they are needed: the table of the guide is what grows.
        self.x = torch.rand(self.batch if self.made else self.size, self.num_pixels).to(device)

    def calls(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches (rows, their positions), without end."""
        if self.made:
            # Different rows all over the table; the stride is a prime.
            rows = 9973 * torch.arange(self.batch, device=self.device)
            return ((self.x, (rows + int(torch.randint(self.size, ()))) % self.size) for _ in itertools.count())
        if self.batch == self.size:
            return itertools.repeat((self.x, torch.arange(self.size, device=self.device)))
        return avi.minibatches(self.x, batch_size=self.batch, seed=seed)

    @property
    def widths(self) -> list[int]:
        """Those of the decoder's layers, from the latents to the pixels."""
        return [self.latent_dim, *self.layers, self.num_pixels]

    def model_and_guide(self):
        """A model and its guide as programs of the library, untrained."""
        decoder = avi.models.DenseDecoder(self.latent_dim, self.layers, (self.num_pixels,))
        likelihood = avi.models.GaussianLikelihood(1.0, learned=False)
        model = avi.models.BayesianDecoder(decoder, size=self.size, likelihood=likelihood).to(self.device)
        kinds = {"constant": avi.ConstantGuide, "factorized": avi.FactorizedGuide}
        if self.kind == "amortized":
            return model, avi.AmortizedGuide(model, encoder=(self.width,), standardize=False)
        return model, kinds[self.kind](model)
