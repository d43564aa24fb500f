"""The importance-weighted bound, its gradient in the guide by the path alone, reparameterized twice."""

import math
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_avi.elbos.several_draws import SeveralDrawsELBO, sites_of
from pyro_avi.elbos.sites import is_drawn, score_of
from pyro_avi.errors import CallError

__all__ = ["DoublyReparameterizedELBO"]


class DoublyReparameterizedELBO(SeveralDrawsELBO):
    r"""The importance-weighted bound with the doubly reparameterized gradient (DReG).

    .. math:: \nabla_\lambda \mathcal{L}_K = E \left[ \sum_k \tilde w_k^2 \nabla_z \log w_k \nabla_\lambda z_k \right], \qquad
              \nabla_\theta \mathcal{L}_K = E \left[ \sum_k \tilde w_k \nabla_\theta \log p_\theta(x, z_k) \right]

    with normalized weights :math:`\tilde w_k`, for the parameters of guide and model. In the guide's its signal does not drown
    in noise as K grows, and with K = 1 it is :class:`~pyro_avi.StickingTheLandingELBO`. The model runs twice for every draw.

    Args:
        num_particles: ``K``.
        vectorize_particles, max_plate_nesting, and others: as for ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: if a latent has no path, or its factor depends on another latent, of which the identity does not hold.

    References:
        Tucker, Lawson, Gu and Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019,
        https://arxiv.org/abs/1810.04152.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> elbo = avi.DoublyReparameterizedELBO(num_particles=5, vectorize_particles=True)
        >>> avi.fit(model, avi.AmortizedGuide(model), x, num_steps=2, elbo=elbo, progress=False).steps
        2
    """

    def _get_trace(self, model, guide, args, kwargs):
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        _check_paths(guide_trace)
        fixed = guide_trace.copy()
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample":
                fixed.nodes[name] = {**site, "value": site["value"].detach()}
        with poutine.block(hide_types=["sample"]):
            at_fixed = poutine.trace(poutine.replay(model, trace=fixed)).get_trace(*args, **kwargs)
        at_fixed.compute_log_prob()
        model_trace.at_fixed = at_fixed
        return model_trace, guide_trace

    def _read(self, pairs, rows):
        of_path = super()._read(pairs, rows)
        at_fixed = rows.join([sum(rows(s["log_prob"]) for s in sites_of(model.at_fixed)) for model, _ in pairs])
        scores = rows.join([sum(rows(score_of(s)) for s in sites_of(guide) if is_drawn(s)) for _, guide in pairs])
        return _TwiceDrawn(of_path.log_weights + scores / rows.scale, at_fixed / rows.scale)

    def bound(self, draws) -> tuple[Tensor, Tensor]:
        """The bound of every row ``[*B]``, and what is differentiated in its place."""
        weights = draws.log_weights
        value = weights.logsumexp(0) - math.log(len(weights))
        share = weights.detach().softmax(0)
        return value, (share.square() * weights + (share - share.square()) * draws.at_fixed).sum(0)


class _TwiceDrawn(NamedTuple):
    """Log weights whose gradient in the guide is that of the path alone, and the model's log density at fixed latents."""

    log_weights: Tensor
    at_fixed: Tensor


def _check_paths(guide_trace: Any) -> None:
    """Refuse latents without a path, and factors that depend on other latents."""
    drawn = [site for site in sites_of(guide_trace) if is_drawn(site)]
    without = [site["name"] for site in drawn if not site["fn"].has_rsample]
    if without:
        raise CallError(
            f"Expected latents that are differentiated through, got {without} of distributions without a path.\n"
            "Pass elbo=avi.VimcoELBO(num_particles=...), the importance-weighted bound of such latents."
        )
    for site in drawn if len(drawn) > 1 else []:
        others = [other["value"] for other in drawn if other is not site and other["value"].requires_grad]
        score = score_of(site)
        if score is not None and others and score.requires_grad:
            found = torch.autograd.grad(score.sum(), others, allow_unused=True, retain_graph=True)
            if any(grad is not None for grad in found):
                raise CallError(
                    f"Expected factors that do not depend on other latents, got one at site {site['name']!r} that does.\n"
                    "Pass elbo=avi.ImportanceWeightedELBO(num_particles=...), the same bound by its total derivative."
                )
