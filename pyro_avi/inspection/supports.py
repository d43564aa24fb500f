"""The supports of sites, and the transforms to them."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.transforms import AffineTransform, ComposeTransform

__all__ = [
    "without_equal_rows",
    "is_like",
    "num_values",
    "support_of_components",
    "unwrapped",
    "support_of",
    "transform_of",
]


def unwrapped(support: Any) -> tuple[constraints.Constraint, int]:
    """The constraint inside ``to_event`` and the number of dimensions that were added around it."""
    dims = 0
    while isinstance(support, constraints.independent):
        support, dims = support.base_constraint, dims + support.reinterpreted_batch_ndims
    return support, dims


def is_like(support: constraints.Constraint, known: constraints.Constraint) -> bool:
    """Whether a support, in all dimensions of an event, is one of those without arguments; copies of them are, too."""
    return type(unwrapped(support)[0]) is type(known)


def transform_of(support: constraints.Constraint) -> Transform:
    """The map from unconstrained coordinates to a support, elementwise where the support is."""
    transform = biject_to(unwrapped(support)[0])
    # A shift by 0 changes nothing, but with it a log-normal is not recognized by closed-form divergences.
    if isinstance(transform, ComposeTransform):
        parts = [part for part in transform.parts if not _is_identity(part)]
        transform = parts[0] if len(parts) == 1 else transform
    return transform


def _is_identity(transform: Transform) -> bool:
    if not isinstance(transform, AffineTransform):
        return False
    return isinstance(transform.loc, int | float) and (transform.loc, transform.scale) == (0, 1)


def support_of(fn) -> constraints.Constraint:
    """The support of observed values, where their distribution has one."""
    try:
        return without_equal_rows(fn.support)
    except (AttributeError, NotImplementedError):
        return constraints.dependent


# A mixture's support, where torch has a constraint of its own for it: earlier it was that of the components.
_MIXTURE = getattr(constraints, "MixtureSameFamilyConstraint", ())

if _MIXTURE:
    # Initial values need these transforms, and torch has none for this constraint.
    for _registry in (biject_to, transform_to):
        _registry.register(
            _MIXTURE, lambda support, registry=_registry: registry(without_equal_rows(support.base_constraint))
        )


def support_of_components(name: str, support: constraints.Constraint) -> constraints.Constraint:
    """The support of a site, for a mixture that of its components."""
    if isinstance(support, constraints.independent):
        base = support_of_components(name, support.base_constraint)
        same = base is support.base_constraint
        return support if same else constraints.independent(base, support.reinterpreted_batch_ndims)
    if not isinstance(support, _MIXTURE):
        return support
    # Components and rows are dimensions of the bounds, which cannot be told apart once the components are gone.
    components = without_equal_rows(support.base_constraint)
    for bound in vars(unwrapped(components)[0]).values():
        if isinstance(bound, Tensor) and bound.dim():
            raise ValueError(
                f"Expected latent {name!r} with one support for all components of its mixture, got {components!r} with "
                "bounds that differ.\nSample on a fixed support and move it: u = pyro.sample(name, ...); "
                "pyro.deterministic(other_name, low + (high - low) * u)."
            )
    return components


def without_equal_rows(support: constraints.Constraint) -> constraints.Constraint:
    """The support with bounds reduced along dimensions in which they are equal, so that it fits any number of rows."""
    parts: dict[str, Any] = {}
    for name, part in vars(support).items():
        if isinstance(part, constraints.Constraint):
            parts[name] = without_equal_rows(part)
        elif isinstance(part, Tensor):
            parts[name] = part
            for dim in range(part.dim()):
                first = parts[name].narrow(dim, 0, 1)
                parts[name] = first if torch.equal(parts[name], first.expand_as(parts[name])) else parts[name]
            while parts[name].dim() and parts[name].shape[0] == 1:
                parts[name] = parts[name].squeeze(0)
    if all(part is getattr(support, name) for name, part in parts.items()):
        # Some supports are known by their identity.
        return support
    support = copy.copy(support)
    vars(support).update(parts)
    return support


def num_values(name: str, fn) -> int | None:
    """The number of values of a discrete latent, ``None`` for a continuous one."""
    support, _ = unwrapped(fn.support)
    if is_like(support, constraints.boolean):
        return 2
    if is_like(support, constraints.one_hot):
        return fn.event_shape[-1]
    if isinstance(support, constraints.integer_interval):
        least, most = support.lower_bound, support.upper_bound
        if isinstance(least, int) and least == 0 and isinstance(most, int):
            return most + 1
    if support.is_discrete:
        raise ValueError(
            f"Expected latent {name!r} with real values or those of a Bernoulli, Categorical or OneHotCategorical, got "
            f"{type(fn).__name__} with support {support!r}.\n"
            "Try one of the following fixes:\n"
            '- sum it out: infer={"enumerate": "parallel"} at its sample statement and TraceEnum_ELBO (finite supports)\n'
            "- write it as a Categorical over its values: it gets a categorical factor"
        )
    return None
