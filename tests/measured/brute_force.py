"""Evidence without the oracles and without the library: Pyro's own density of a call as a whole, and weighted draws."""

import math

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc.util import initialize_model

from tests.measured.structure import Measured

__all__ = ["laplace", "log_evidence"]


def laplace(structure: Measured) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The latents at the mode of their joint density, and a standard deviation from there, by site.

    The latter are those of the best independent normals, where the posterior is normal in unconstrained coordinates.
    """
    log_joint, initial, transforms = _density(structure)
    mode = _mode(log_joint, torch.cat([value.flatten() for value in initial.values()]))
    precision = -torch.autograd.functional.hessian(log_joint, mode).double()
    return tuple(
        {name: transforms[name].inv(value) if name in transforms else value for name, value in start.items()}
        for start in (_by_site(mode, initial), _by_site(mode + precision.diagonal().rsqrt().float(), initial))
    )


def log_evidence(structure: Measured, *, num_samples: int) -> tuple[float, float]:
    """The log evidence of all rows given the global latents, and its standard error.

    The density is that which Pyro's HMC climbs: discrete latents are summed out, the others in unconstrained coordinates.
    Draws come from a normal at its mode, which gives the answer exactly where it is a normal itself, else from Student's t
    distributions there; or from wide ones around 0, where it may have several modes.

    Args:
        structure: with ``brute_force``.
        num_samples: the number of weighted draws.
    """
    log_joint, initial, _ = _density(structure)
    count = sum(value.numel() for value in initial.values())
    if structure.brute_force == "wide":
        return _weighted(log_joint, torch.zeros(count), 1.5 * torch.eye(count), num_samples, freedom=8.0)
    mode = _mode(log_joint, torch.zeros(count))
    precision = -torch.autograd.functional.hessian(log_joint, mode).double()
    root = torch.linalg.cholesky(torch.linalg.inv(precision)).float()
    value, error = _weighted(log_joint, mode, root, 5, freedom=math.inf)
    return (value, 1e-3) if error < 1e-3 else _weighted(log_joint, mode, 1.3 * root, num_samples, freedom=8.0)


def _density(structure: Measured):
    """The log density of a vector of coordinates, values by site that tell their shapes, and the maps to the supports."""
    model = structure.restated or structure.make()
    if isinstance(model, torch.nn.Module):
        model.eval()
    if structure.theta:
        model = poutine.block(poutine.condition(model, data=structure.theta), hide=list(structure.theta))
    with pyro.validation_enabled(False):
        initial, potential, transforms, _ = initialize_model(
            model, structure.args, max_plate_nesting=structure.nesting, skip_jit_warnings=True
        )
    initial = {name: torch.zeros_like(value) for name, value in initial.items()}
    return lambda point: -potential(_by_site(point, initial)).double(), initial, transforms


def _by_site(point, like):
    parts = point.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}


def _mode(log_joint, start):
    point = start.clone().requires_grad_()
    search = torch.optim.LBFGS([point], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure():
        search.zero_grad()
        loss = -log_joint(point)
        loss.backward()
        return loss

    search.step(closure)
    return point.detach()


def _weighted(log_joint, loc, root, num_samples, *, freedom):
    """The log of the mean weight of draws whose coordinates, before ``root``, are independent."""
    finite = math.isfinite(freedom)
    law = torch.distributions.StudentT(freedom) if finite else torch.distributions.Normal(0.0, 1.0)
    noise = law.sample((num_samples, len(loc)))
    density = law.log_prob(noise).double().sum(-1) - root.diagonal().double().log().sum()
    with torch.no_grad():
        joint = torch.stack([log_joint(loc + root @ draw) for draw in noise])
    weights = joint - density
    relative = len(weights) * weights.softmax(0)
    return (weights.logsumexp(0) - math.log(num_samples)).item(), (relative.std() / num_samples**0.5).item()
