"""The problem of the sweep `linear`: `NormalNormal` with the published scales."""

import torch

import pyro_avi as avi
from pyro_avi.encoders import Polynomial

__all__ = ["Linear"]

TAU, SIGMA, DATA_SEED = 1.155, 2.43, 1954


class Linear:
    """x_n ~ N(theta + tau z_n, sigma^2), z_n ~ N(0, 1), a flat prior on theta: a `comparison.training.Problem`."""

    def __init__(self, rows: int):
        self.model = avi.models.NormalNormal(TAU, SIGMA, size=rows)
        generator = torch.Generator().manual_seed(DATA_SEED)
        self.x = (TAU**2 + SIGMA**2) ** 0.5 * torch.randn(rows, 1, generator=generator)
        self.evidence = self.model.log_evidence(self.x).item()
        self.best = self.evidence - self.model.approximation_gap(self.x).item()
        # Of log w = log p(x) + c - tau / sigma^2 sum_n dz_n dtheta: theta and each z meet in one product.
        self.spread = (TAU**2 / (TAU**2 + SIGMA**2)) ** 0.5

    def guide(self, arm: str) -> avi.AmortizedGuide | avi.FactorizedGuide:
        """The guide of an arm."""
        if arm == "F-VI":
            return avi.FactorizedGuide(self.model)
        return avi.AmortizedGuide(self.model, Polynomial(1, int(arm.removeprefix("degree "))))

    def bound(self, guide: avi.AmortizedGuide | avi.FactorizedGuide) -> float:
        """The exact ELBO."""
        q = {"theta": guide.global_guide.posterior_by_site()["theta"], "z": guide.fixed_posterior(self.x)}
        return self.evidence - self.model.inference_gap(self.x, q).item()

    def predicted(self, arm: str) -> float | None:
        """What the best factors of an arm lose: nothing, or if constant S_xx tau^2 / (2 sigma^2 (sigma^2 + tau^2))."""
        if arm != "degree 0":
            return 0.0
        x = self.x.double()
        return ((x - x.mean()).square().sum() * TAU**2 / (2 * SIGMA**2 * (TAU**2 + SIGMA**2))).item()
