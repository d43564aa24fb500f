"""The ELBO with the score function against baselines, by what a latent has an effect on."""

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.infer import TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_avi.elbos.sites import WithoutPath, is_drawn, parameters_of

__all__ = ["RaoBlackwellizedELBO"]


class RaoBlackwellizedELBO(TraceGraph_ELBO):
    r"""``TraceGraph_ELBO`` with a baseline for every latent that is given the score function.

    .. math:: \nabla_\lambda \mathrm{ELBO} = E_q \left[ \sum_i \nabla_\lambda \log q_\lambda(z_i)
              \left( C_i - b_i \right) \right] + \dots

    with the terms :math:`C_i` of :math:`\log p(x, z) - \log q(z)` that depend on :math:`z_i` and a baseline :math:`b_i` that
    does not. ``"average"`` is that of Pyro, a decaying average by the position of a row in the batch; ``"learned"`` a network
    that reads the parameters of the row's factor at the site, and so whatever the guide's encoder knows of the row. It is
    fitted to :math:`C_i` by least squares, by the optimizer and learning rate of everything else.

    Args:
        baseline: ``"average"``, ``"learned"``, or ``None`` for those that the guide's sites ask for themselves, by Pyro's
            ``infer={"baseline": ...}``, if they do.
        continuous: whether latents with a path are given the score function as well.
        widths: the layers of a learned baseline.
        num_particles, vectorize_particles, and others: as for ``pyro.infer.TraceGraph_ELBO``.

    Attributes:
        networks: the learned baselines by site, which are made at the first call.

    Raises:
        ValueError: if ``baseline`` is none of these.

    References:
        Mnih and Gregor, "Neural Variational Inference and Learning in Belief Networks", 2014,
        https://arxiv.org/abs/1402.0030.
        Schulman, Heess, Weber and Abbeel, "Gradient Estimation Using Stochastic Computation Graphs", 2015,
        https://arxiv.org/abs/1506.05254.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> elbo = avi.RaoBlackwellizedELBO(baseline="learned", continuous=True)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=elbo, progress=False).steps
        2
        >>> list(elbo.networks)
        ['z']
    """

    def __init__(
        self, baseline: str | None = None, *, continuous: bool = False, widths: Sequence[int] = (32,), **kwargs
    ):
        if baseline not in (None, "average", "learned"):
            raise ValueError(f"Expected baseline to be 'average', 'learned' or None, got {baseline!r}.")
        super().__init__(**kwargs)
        self.baseline, self._continuous, self._widths = baseline, continuous, tuple(widths)
        self.networks: dict[str, nn.Module] = {}

    def _get_trace(self, model, guide, args, kwargs):
        def with_baselines(*args, **kwargs):
            with _Baselines(self):
                return drawn(*args, **kwargs)

        drawn = WithoutPath()(guide) if self._continuous else guide
        traces = super()._get_trace(model, with_baselines, args, kwargs)
        # Where Pyro and `fit` find parameters to train.
        for name, network in self.networks.items():
            pyro.module(f"baseline_of_{name}", network)
        return traces

    def network(self, name: str, inputs: Tensor) -> nn.Module:
        """The learned baseline of a site.

        Args:
            name: of the site.
            inputs: ``[*B, F]`` what it reads, of which the first call tells it the number of features.
        """
        if name not in self.networks:
            sizes = (inputs.shape[-1], *self._widths)
            layers = [layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
            self.networks[name] = nn.Sequential(*layers, _OneNumber(sizes[-1], 1)).to(inputs)
        return self.networks[name]


class _OneNumber(nn.Linear):
    """A linear layer to one number, without a dimension of its own: ``[*B, F]`` to ``[*B]``, also outside of all plates."""

    def forward(self, input: Tensor) -> Tensor:
        """The numbers."""
        return super().forward(input).squeeze(-1)


class _Baselines(Messenger):
    """Asks for the baseline of an ELBO at every latent without a path."""

    def __init__(self, elbo: RaoBlackwellizedELBO):
        super().__init__()
        self._elbo = elbo

    def _pyro_sample(self, msg: Any) -> None:
        if self._elbo.baseline is None or not is_drawn(msg) or msg["fn"].has_rsample:
            return
        options: dict[str, Any] = {"use_decaying_avg_baseline": True}
        if self._elbo.baseline == "learned":
            inputs = _features(msg["fn"])
            options = {"nn_baseline": self._elbo.network(msg["name"], inputs), "nn_baseline_input": inputs}
        msg["infer"] = {**msg["infer"], "baseline": options}


def _features(fn: Any) -> Tensor:
    """``[*B, F]`` the parameters of a distribution for each element of its batch."""
    tensors = [x.detach() for x in parameters_of(fn).values()]
    # Some parameters have dimensions of their own behind the batch, others that of the event as one of the batch.
    batch = fn.batch_shape
    return torch.cat([x.expand(batch + x.shape[len(batch) :]).reshape(*batch, -1) for x in tensors], -1)
