"""What a gradient estimator is: an ELBO, and what may be asked of it."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.infer import ELBO

from pyro_avi.elbos.relaxed import RelaxedELBO
from pyro_avi.elbos.several_draws import sites_of
from pyro_avi.elbos.sites import innermost, is_drawn
from pyro_avi.gradients import estimators

__all__ = ["GradientEstimator", "Pair", "estimator_names", "find_estimator"]


@dataclass(frozen=True)
class Pair:
    """What estimators ask of a model and a guide, and the options of those that have any.

    Attributes:
        with_path: by latent of the guide whether it is differentiated through.
        supports: by latent without a path the name of its distribution, and whether it has a list of values.
        one_by_one: whether ``TraceEnum_ELBO`` can list the values of every latent without a path: those of its elements.
        in_guide: the ``id`` of the parameters that the guide uses.
        max_plate_nesting: the dimensions of the plates.
        num_particles: K, of estimators of several draws.
        temperature: of relaxed latents.
    """

    with_path: Mapping[str, bool]
    supports: Mapping[str, tuple[str, bool]]
    one_by_one: bool
    in_guide: frozenset[int]
    max_plate_nesting: int
    num_particles: int
    temperature: float

    @classmethod
    def of(
        cls,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        num_particles: int,
        temperature: float,
    ) -> "Pair":
        """Look at a call of a pair.

        Args:
            model, guide, args, kwargs: the pair, and a call of both.
            num_particles, temperature: the options.
        """
        with poutine.block(), torch.no_grad():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        drawn = [site for site in sites_of(guide_trace) if is_drawn(site)]
        without = [site for site in drawn if not site["fn"].has_rsample]
        inner = {site["name"]: innermost(site["fn"]) for site in without}
        parameters = [site for site in guide_trace.nodes.values() if site["type"] == "param"]
        frames = [frame for site in sites_of(model_trace, guide_trace) for frame in site["cond_indep_stack"]]
        return cls(
            {site["name"]: site["fn"].has_rsample for site in drawn},
            {name: (type(fn).__name__, fn.has_enumerate_support) for name, fn in inner.items()},
            all(site["fn"].event_shape == inner[site["name"]].event_shape for site in without),
            frozenset(id(site["value"].unconstrained()) for site in parameters),
            max((-frame.dim for frame in frames if frame.vectorized), default=0),
            num_particles,
            temperature,
        )

    @property
    def discrete(self) -> list[str]:
        """The latents without a path."""
        return [name for name, path in self.with_path.items() if not path]

    def require_paths(self, estimator: str) -> None:
        """Refuse latents without a path.

        Args:
            estimator: the name of the estimator, for the message.

        Raises:
            ValueError: if there is one.
        """
        if self.discrete:
            raise ValueError(
                f"Expected latents that are differentiated through for {estimator!r}, got {self.discrete} of distributions "
                "without a path.\nTake 'leave_one_out' or 'enumeration', or relax them: 'gumbel_softmax'."
            )

    def require_discrete(self, estimator: str) -> None:
        """Refuse a pair without discrete latents, and those with an infinite support.

        Args:
            estimator: the name of the estimator, for the message.

        Raises:
            ValueError: if it is one of these.
        """
        if not self.discrete:
            raise ValueError(
                f"Expected discrete latents for {estimator!r}, got {list(self.with_path)}, all with a path."
            )
        infinite = {name: kind for name, (kind, finite) in self.supports.items() if not finite}
        if infinite:
            raise ValueError(
                f"Expected latents with a finite list of values for {estimator!r}, got {infinite}.\n"
                "Take 'leave_one_out' or 'score_function', which draw them."
            )

    def require_relaxable(self, estimator: str) -> None:
        """Refuse a pair without discrete latents, and those that have no values between their values.

        Args:
            estimator: the name of the estimator, for the message.

        Raises:
            ValueError: if it is one of these.
        """
        self.require_discrete(estimator)
        known = {kind.__name__ for kind in RelaxedELBO.kinds}
        others = {name: kind for name, (kind, _) in self.supports.items() if kind not in known}
        if others:
            raise ValueError(
                f"Expected latents of {' or '.join(sorted(known))} for {estimator!r}, got {others}.\n"
                "Write the site as a one-hot vector, or take 'leave_one_out' or 'enumeration'."
            )


class GradientEstimator(ABC):
    """An estimator of the gradient of a bound.

    Subclasses are final, one a file of ``pyro_avi/gradients/estimators``.
    """

    #: What its mean is the gradient of: ``"ELBO"`` or ``"importance-weighted"``, the bound of K draws.
    bound: ClassVar[str] = "ELBO"
    #: Whether its mean is another one.
    is_biased: ClassVar[bool] = False
    #: Evaluations before the first that counts, of estimators that have a state.
    warm_up: ClassVar[int] = 0

    @abstractmethod
    def create(self, pair: Pair) -> ELBO:
        """The ELBO that it is the gradient of.

        Args:
            pair: what it is used on.

        Raises:
            ValueError: if it cannot be.
        """

    def guide(self, guide: Callable) -> Callable:
        """The guide as the ELBO is to run it.

        Args:
            guide: the guide.
        """
        return guide


def estimator_names() -> list[str]:
    """The names of all estimators, which are those of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(estimators.__path__))


def find_estimator(name: str) -> GradientEstimator:
    """The estimator of this name.

    Args:
        name: one of :func:`estimator_names`.

    Raises:
        ValueError: if there is none.
    """
    if name not in estimator_names():
        raise ValueError(f"Expected estimators among {', '.join(estimator_names())}, got {name!r}.")
    module = importlib.import_module(f"{estimators.__name__}.{name}")
    return getattr(module, name.title().replace("_", ""))()
