"""A Gaussian process on a grid, seen through noise."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_avi.models.joint_rows import JointRows

__all__ = ["GaussianProcess"]


class GaussianProcess(JointRows):
    r"""A function on a grid with a Gaussian process prior, each value seen through normal noise.

    .. math:: z_{1:N} \sim N(0, k(t_{1:N}, t_{1:N})), \qquad x_n \sim N(z_n, \sigma^2)

    The rows are the grid's points. The posterior of a value depends on all observations within the correlation length, so
    the gap of an encoder stays large until the window that it reads covers it.

    The prior ties the rows, which Pyro's plate takes for independent. The n-th log probability at site ``"z"`` is
    :math:`\log p(z_n \mid z_1, \dots, z_{n-1})`; bounds and weights of all points are right, minibatches are refused.
    The answers are those of :class:`~pyro_avi.models.joint_rows.JointRows`.

    Args:
        kernel: a function from the grid to its covariance matrix ``[N, N]``, such as those of ``pyro.contrib.gp.kernels``.
        grid: ``[N]`` or ``[N, d]``, what the kernel is called with, in double precision; the model's densities and draws
            have its precision.
        scale: :math:`\sigma`, the standard deviation of the noise.

    Raises:
        ValueError: if the kernel returns no matrix ``[N, N]``, or one that is not positive definite in double precision;
            if the grid is empty or the scale not positive.

    References:
        Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, http://gaussianprocess.org/gpml.
        Margossian and Blei, "Amortized Variational Inference: When and Why?", 2024, https://arxiv.org/abs/2307.11018.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> kernel = lambda t: (-(t.unsqueeze(-1) - t).abs() / 3.0).exp()
        >>> model = avi.models.GaussianProcess(kernel, torch.arange(20.0), 0.5)
        >>> x = model()
        >>> model.posterior(x).event_shape, model.best_diagonal(x).batch_shape
        (torch.Size([20]), torch.Size([20]))
    """

    def __init__(self, kernel: Callable[[Tensor], Tensor], grid: Tensor, scale: float):
        if not grid.is_floating_point() or not len(grid):
            raise ValueError(f"Expected a grid of real numbers, got {len(grid)} points of type {grid.dtype}.")
        dtype = grid.dtype
        grid = grid.detach().double()
        with torch.no_grad():
            covariance = kernel(grid)
        if covariance.shape != (len(grid), len(grid)):
            raise ValueError(
                f"Expected a kernel that returns the covariance [{len(grid)}, {len(grid)}] of the grid's points, got shape "
                f"{tuple(covariance.shape)}."
            )
        scale_tril, failed = torch.linalg.cholesky_ex(covariance.double())
        if failed:
            raise ValueError(
                f"Expected a kernel with a positive definite covariance, got one that is not at point {failed.item() - 1} of "
                f"{len(grid)}.\nA smooth kernel on a fine grid is singular to machine precision: add a little independent "
                "variance to the diagonal, or take a coarser grid or a rougher kernel."
            )
        super().__init__(scale_tril, torch.ones(1, 1).to(grid), scale, plate="data", is_scalar=True, dtype=dtype)
