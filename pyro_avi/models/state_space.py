"""A linear-Gaussian state-space model: a hidden Markov chain seen through noise."""

import torch
from torch import Tensor

from pyro_avi.models.checks import as_scales
from pyro_avi.models.joint_rows import JointRows

__all__ = ["LinearGaussianStateSpace"]


class LinearGaussianStateSpace(JointRows):
    r"""One series: a hidden linear Markov chain, every state seen through linear normal noise.

    .. math:: z_1 \sim N(0, P_1), \qquad z_t \sim N(A z_{t-1}, \mathrm{diag}(q^2)), \qquad
              x_t \sim N(C z_t, \mathrm{diag}(r^2))

    The rows are the time steps, in a plate ``"time"``: a guide has one factor for each state, so an encoder answers for a
    state from what it reads around it, and a wider window is worth something. The posterior of a state depends on the whole
    series, so the gap to the Kalman smoother's answer shrinks as the window grows and never vanishes.

    Pyro's plate stands for independent rows, and the chain's are not. The n-th log probability at site ``"z"`` is
    :math:`\log p(z_t \mid z_{t-1})`; bounds and weights of the whole series are right, minibatches of steps are refused.
    The answers are those of :class:`~pyro_avi.models.joint_rows.JointRows`.

    Args:
        transition: ``[H, H]``, :math:`A`; the model's densities and draws have its precision.
        emission: ``[D, H]``, :math:`C`.
        size: the number of time steps.
        transition_scale: :math:`q`, a number or ``[H]``.
        emission_scale: :math:`r`, a number or ``[D]``.
        initial_scale: the standard deviations of the first state, a number or ``[H]``; by default the chain is stationary.

    Raises:
        ValueError: if shapes do not fit, a scale is not positive, or no stationary chain has this transition.

    References:
        Rauch, Tung and Striebel, "Maximum Likelihood Estimates of Linear Dynamic Systems", 1965,
        https://doi.org/10.2514/3.3166.
        Margossian and Blei, "Amortized Variational Inference: When and Why?", 2024, https://arxiv.org/abs/2307.11018.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> one = torch.ones(1, 1)
        >>> model = avi.models.LinearGaussianStateSpace(
        ...     0.8 * one, one, size=30, transition_scale=1.0, emission_scale=0.7
        ... )
        >>> x = model()
        >>> model.posterior(x).event_shape, model.best_diagonal(x).batch_shape
        (torch.Size([30]), torch.Size([30]))
        >>> bool(model.window_gap(0) > 10 * model.window_gap(2))
        True
    """

    def __init__(
        self,
        transition: Tensor,
        emission: Tensor,
        *,
        size: int,
        transition_scale: float | Tensor,
        emission_scale: float | Tensor,
        initial_scale: float | Tensor | None = None,
    ):
        if size < 1:
            raise ValueError(f"Expected size to be the number of time steps, got {size}.")
        latents = len(transition)
        if not transition.is_floating_point() or not transition.isfinite().all():
            raise ValueError(f"Expected a transition of finite real numbers, got {transition.tolist()}.")
        if transition.shape != (latents, latents) or emission.dim() != 2 or emission.shape[1] != latents:
            raise ValueError(
                f"Expected transition [H, H] and emission [D, H], got {tuple(transition.shape)} and {tuple(emission.shape)}."
            )
        dtype = transition.dtype
        transition, emission = transition.detach().double(), emission.detach().double()
        scale = as_scales("transition_scale", transition_scale, latents, transition).diag()
        if initial_scale is None:
            first = torch.linalg.cholesky(_stationary(transition, scale.square()))
        else:
            first = as_scales("initial_scale", initial_scale, latents, transition).diag()
        # z_t is a sum over the steps' independent noises: each row of blocks is the one above, moved on, and a new noise.
        blocks = transition.new_zeros(size, latents, size, latents)
        blocks[0, :, 0] = first
        for t in range(1, size):
            blocks[t] = torch.einsum("hg,gsk->hsk", transition, blocks[t - 1])
            blocks[t, :, t] = scale
        scale_tril = blocks.reshape(size * latents, size * latents)
        super().__init__(scale_tril, emission, emission_scale, plate="time", is_scalar=False, dtype=dtype)


def _stationary(transition: Tensor, noise: Tensor) -> Tensor:
    """The covariance P = A P A' + Q of the chain that has run forever."""
    radius = torch.linalg.eigvals(transition).abs().max()
    if not radius < 1:
        raise ValueError(
            f"Expected a transition whose eigenvalues are smaller than 1 in modulus, got {radius.item():.6g}: such a chain has "
            "no stationary distribution.\nPass initial_scale= for the first state."
        )
    latents = len(transition)
    system = torch.eye(latents**2).to(transition) - torch.kron(transition, transition)
    covariance = torch.linalg.solve(system, noise.reshape(-1)).reshape(latents, latents)
    return 0.5 * (covariance + covariance.T)
