"""The log weights of the factors of a table, row by row: what a search for better factors asks for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pyro_avi.densities.log_joint import LocalJoint
from pyro_avi.densities.log_weights import LogWeights, log_weights
from pyro_avi.densities.row_densities import TiedRowsError
from pyro_avi.evidence.ais import isolated_sampling
from pyro_avi.guides import FactorizedGuide
from pyro_avi.inspection.isolated_run import isolated_run

__all__ = ["Draws", "JointWeights", "TraceWeights", "WeightSource", "by_row", "weight_source"]


class Draws(NamedTuple):
    """The number of draws and their seed; two factors are compared by the same draws."""

    num_samples: int
    seed: int


class WeightSource(ABC):
    """Gives the log weights of a table's factors, by the same draws for all tables of one family.

    Attributes:
        blocks: by the name of a table the block ``[N]`` that each of its rows is weighed in, when weights have been asked
            for; ``None`` where block ``n`` is row ``n``.
    """

    blocks: Mapping[str, Tensor] | None = None

    @abstractmethod
    def weights(self, guide: FactorizedGuide, draws: Draws) -> LogWeights:
        """The log weights of an even number of draws, at least as many as are asked for.

        Args:
            guide: with a table for the rows of the call.
            draws: their number and seed.
        """


class JointWeights(WeightSource):
    """Log weights by the log joint of the rows, for many draws at once.

    Args:
        joint: of the model.
        args, kwargs: of the model.
        max_memory: in bytes, what the draws that are evaluated at a time may take.
    """

    def __init__(self, joint: LocalJoint, args: tuple, kwargs: Mapping[str, Any], *, max_memory: int):
        self.joint, self.max_memory = joint, max_memory
        self._args, self._kwargs = args, kwargs

    def weights(self, guide: FactorizedGuide, draws: Draws) -> LogWeights:
        """The log weights of an even number of draws, at least as many as are asked for."""
        with isolated_sampling(draws.seed):
            factors = guide.fixed_posterior(*self._args, **self._kwargs)
            return self.joint.log_weights(
                factors,
                num_samples=draws.num_samples,
                max_memory=self.max_memory,
                symmetric=guide.family.symmetric,
            )


class TraceWeights(WeightSource):
    """Log weights by traces of the model and the guide, one draw after the other; for any latents.

    Args:
        model, args, kwargs: what the guide is for.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any]):
        self._model, self._args, self._kwargs = model, args, kwargs

    def weights(self, guide: FactorizedGuide, draws: Draws) -> LogWeights:
        """The log weights of an even number of draws, at least as many as are asked for."""
        even = draws.num_samples + draws.num_samples % 2
        with isolated_run(draws.seed):
            weights = log_weights(
                self._model, guide, *self._args, num_samples=even, seed=None, progress=False, **self._kwargs
            )
        # Rows that share a factor, as those of crossed plates share observations, are weighed together.
        if weights.blocks is not None:
            self.blocks = {" x ".join(plates): blocks for plates, blocks in weights.blocks.items()}
        return weights


def weight_source(
    model: Callable, guide: FactorizedGuide, args: tuple, kwargs: Mapping[str, Any], *, max_memory: int = 2**30
) -> WeightSource:
    """The fastest source of log weights for a model.

    Args:
        model: what the guide is for.
        guide: with a table for the rows of the call.
        args, kwargs: of the model.
        max_memory: in bytes, what the draws that are evaluated at a time may take.
    """
    latents = [latent for row_factor in guide.row_factors for latent in row_factor.row_set.latents]
    alone = len(guide.row_plates) == len(guide.row_factors) == 1 and not guide.global_latents
    if not alone or any(latent.num_values is not None or latent.is_weighted for latent in latents):
        return TraceWeights(model, args, kwargs)
    try:
        with isolated_run(0):
            joint = LocalJoint(model, args, kwargs, plate=guide.row_plates[0])
    except TiedRowsError:
        return TraceWeights(model, args, kwargs)
    return JointWeights(joint, args, kwargs, max_memory=max_memory)


def by_row(values: Tensor, blocks: Tensor | None) -> Tensor:
    """Values by block of rows, expanded to each row of a table ``[N, 1]``.

    Args:
        values: ``[M]``.
        blocks: ``[N]`` the block of each row; ``None`` where block ``n`` is row ``n``.
    """
    return (values if blocks is None else values[blocks]).unsqueeze(-1)
