"""Means of sites, by closed forms or quadrature from normal coordinates, or as averages of draws."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform

from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.inspection.structure import Latent

__all__ = ["drawn_means", "mean_on_support"]

# Of the trapezoidal rule, whose error falls exponentially in the number of points: 1e-9 of the range of a logistic function
# of a normal with standard deviation 5.
_POINTS, _REACH = 241, 12.0
# The number of draws that a mean is the average of, and how many numbers are held in memory at a time.
_DRAWS, _NUMBERS = 1000, 2**22


def mean_on_support(latent: Latent, loc: Tensor, scale: Tensor) -> Tensor | None:
    r"""The mean of a site of which each unconstrained coordinate is normal, ``None`` where that does not decide it.

    .. math:: E[t(m + s \epsilon)], \qquad \epsilon \sim N(0, 1)

    Exact for real sites and such as are bounded from one side, whose transform is an exponential; by quadrature for other
    transforms by elements.

    Args:
        latent: the latent.
        loc, scale: :math:`m` and :math:`s`, in the shape of the site behind any other dimensions.
    """
    if latent.is_real:
        return loc
    transform = latent.transform
    parts = transform.parts if isinstance(transform, ComposeTransform) else [transform]
    if latent.independent_dim < latent.event_dim or transform.domain.event_dim or transform.codomain.event_dim:
        return None
    if isinstance(parts[0], ExpTransform) and all(isinstance(part, AffineTransform) for part in parts[1:]):
        # E[a + b exp(u)] = a + b exp(m + s^2 / 2).
        return latent.to_support(loc + scale.square() / 2)
    points = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.double).tolist()
    weights = torch.tensor(points, dtype=torch.double).square().mul(-0.5).softmax(0).tolist()
    m, s = loc.double(), scale.double()
    # Point by point, since the result for many rows is large already.
    return sum(weight * latent.to_support(m + s * point) for point, weight in zip(points, weights, strict=True)).to(loc)


def drawn_means(draw: Callable[[int], Mapping[str, Tensor]], names: Sequence[str], numbers: int) -> dict[str, Tensor]:
    """The averages of 1,000 draws under a fixed seed.

    Args:
        draw: gives so many draws of the sites, ``[count, ...]`` each.
        names: of the sites asked for.
        numbers: about how many a draw takes, so that memory does not hold all at once.
    """
    count = min(_DRAWS, max(1, _NUMBERS // max(1, numbers)))
    result: dict[str, Tensor] = {}
    with isolated_run(0):
        for start in range(0, _DRAWS, count):
            draws = draw(min(count, _DRAWS - start))
            for name in names:
                value = draws[name]
                part = (value if value.is_floating_point() else value.to(torch.get_default_dtype())).sum(0) / _DRAWS
                result[name] = result[name] + part if name in result else part
    return result
