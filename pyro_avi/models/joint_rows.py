"""What models share whose rows are tied by a normal prior: a series, a process on a grid."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from pyro_avi.errors import CallError
from pyro_avi.models.checks import as_scales, check_rows
from pyro_avi.models.normal_posterior import NormalPosterior, in_double

__all__ = ["JointNormal", "JointRows"]


class JointNormal(dist.TorchDistribution):
    r"""A multivariate normal whose coordinates are the rows of a plate.

    .. math:: \log p(z_{1:N}) = \sum_n \log p(z_n \mid z_1, \dots, z_{n-1})

    The n-th log probability is the n-th term. Their sum is the joint density, which is all that a bound or a weight needs; a
    part of the rows has none.

    Args:
        scale_tril: ``[N H, N H]`` the Cholesky factor of the covariance, rows outermost.
        event_shape: of a row, ``H`` elements.
        batch_shape: the rightmost dimension holds the rows.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, scale_tril: Tensor, event_shape: Sequence[int] = (), batch_shape: Sequence[int] | None = None):
        self.scale_tril = scale_tril
        event_shape = torch.Size(event_shape)
        rows = (len(scale_tril) // event_shape.numel(),)
        super().__init__(torch.Size(rows if batch_shape is None else batch_shape), event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All of the real space."""
        return constraints.independent(constraints.real, self.event_dim) if self.event_dim else constraints.real

    def expand(self, batch_shape, _instance=None) -> "JointNormal":
        """The same with more dimensions to the left of the rows."""
        return JointNormal(self.scale_tril, self.event_shape, batch_shape)

    def rsample(self, sample_shape=()) -> Tensor:
        """Draws of all rows together."""
        shape = self._extended_shape(torch.Size(sample_shape))
        lead = shape[: len(shape) - 1 - self.event_dim]
        noise = self.scale_tril.new_empty((*lead, len(self.scale_tril))).normal_()
        return (noise @ self.scale_tril.T).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of every row given those before it, shape as the batch."""
        flat = value.reshape((-1, len(self.scale_tril)))
        noise = torch.linalg.solve_triangular(self.scale_tril, flat.T, upper=False).T
        terms = -0.5 * noise.square() - self.scale_tril.diagonal().log() - 0.5 * math.log(2 * math.pi)
        terms = terms.reshape(value.shape)
        return terms.sum(-1) if self.event_dim else terms


class JointRows(NormalPosterior, PyroModule):
    r"""Latents with a joint normal prior, each seen through linear normal noise.

    .. math:: z_{1:N} \sim N(0, \Sigma), \qquad x_n \sim N(C z_n, \mathrm{diag}(\sigma^2))

    All rows are one block: ``log_evidence``, ``approximation_gap``, ``inference_gap`` and ``tail_index`` answer for all rows
    together, ``[]``. The posterior has the event ``[N H]``, rows outermost: for a chain its means and variances are those of
    the Kalman smoother. It is the optimum of no guide, whose rows are independent.

    Cost and memory are those of a dense Cholesky factor, cubic and square in ``N H``: up to a few thousand. Subclasses are
    final and give the prior.

    Args:
        scale_tril: ``[N H, N H]`` the Cholesky factor of the prior's covariance, rows outermost; the model has its device.
        emission: ``[D, H]``, :math:`C`.
        scale: the standard deviation of the noise, a number or ``[D]``.
        plate: the name of the plate of the rows.
        is_scalar: whether ``z`` and ``x`` are ``[N]`` rather than ``[N, H]`` and ``[N, D]``.
        dtype: of the model's own densities and draws; the exact answers are in double precision.

    Raises:
        ValueError: if a scale is not positive.
    """

    def __init__(
        self,
        scale_tril: Tensor,
        emission: Tensor,
        scale: float | Tensor,
        *,
        plate: str,
        is_scalar: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self._plate = plate
        self._shapes = ((), ()) if is_scalar else ((emission.shape[1],), (len(emission),))
        self.size = len(scale_tril) // emission.shape[1]
        # A covariance rounded to single precision is another one, and often no longer positive definite.
        self._exact = (scale_tril, emission, as_scales("the noise's scale", scale, len(emission), scale_tril))
        for name, value in zip(("_scale_tril", "_emission", "_scale"), self._exact, strict=True):
            self.register_buffer(name, value.to(dtype), persistent=False)

    def forward(self, x: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Run the model.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``. Left out, the model draws them.
            index: must be left out: rows that are tied by their prior come all together.

        Raises:
            ValueError: if only a part of the rows is given.
        """
        latent_shape, shape = self._shapes
        if index is not None or (x is not None and x.shape != (self.size, *shape)):
            name, given = ("x", x) if index is None else ("index", index)
            got = f"{name} of shape {() if given is None else tuple(given.shape)}"
            raise CallError(
                f"Expected all {self.size} rows of plate {self._plate!r} and x of shape {(self.size, *shape)}, got {got}.\n"
                "The prior ties the rows: a part of them has no density of its own. Call model(x) with the whole series."
            )
        with pyro.plate(self._plate, self.size, dim=-1):
            z = pyro.sample("z", JointNormal(self._scale_tril, latent_shape))
            if latent_shape:
                fn = dist.Normal(z @ self._emission.T, self._scale).to_event(1)
            else:
                fn = dist.Normal(self._emission[0, 0] * z, self._scale[0])
            return pyro.sample("x", fn, obs=x)

    def _given(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The prior's Cholesky factor, emission and noise in double precision, where the data are."""
        scale_tril, emission, noise = (value.to(like.device) for value in self._exact)
        return scale_tril, emission, noise

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale_tril, emission, scale = self._given(x)
        weighted = emission / scale.square().unsqueeze(-1)
        of_noise = torch.block_diag(*[emission.T @ weighted] * self.size)
        precision = torch.cholesky_inverse(scale_tril) + of_noise
        x = check_rows(x, self._shapes[1], self.size).reshape(self.size, -1)
        root = torch.linalg.cholesky(precision)
        return torch.cholesky_solve((x @ weighted).reshape(-1, 1), root).squeeze(-1), precision

    def _rows(self, values: Tensor) -> Tensor:
        return values.reshape(self.size, -1)

    def _blocks(self, values: Tensor) -> Tensor:
        return values.reshape(-1)

    def _covariance(self, like: Tensor) -> Tensor:
        """``[N D, N D]`` of the observations."""
        scale_tril, emission, scale = self._given(like)
        root = torch.block_diag(*[emission] * self.size) @ scale_tril
        return root @ root.T + scale.square().repeat(self.size).diag()

    def log_evidence(self, x: Tensor) -> Tensor:
        r"""``[]`` the exact :math:`\log p(x_{1:N})` of all rows together.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``.
        """
        x = check_rows(x, self._shapes[1], self.size)
        covariance = self._covariance(x)
        return dist.MultivariateNormal(covariance.new_zeros(len(covariance)), covariance).log_prob(x.reshape(-1))

    def inference_gap(self, x: Tensor, q: dist.TorchDistribution) -> Tensor:
        r"""``[]`` the evidence minus the ELBO of a normal factor, :math:`\mathrm{KL}(q \,\|\, p(z \mid x))`, over all rows.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``.
            q: normals with the rows as their batch, such as ``guide.posterior(x)``, or one of all rows together.

        Raises:
            ValueError: if ``q`` is no normal.
        """
        q = in_double(q)
        if isinstance(q, dist.MultivariateNormal) and q.batch_shape == (self.size,):
            q = dist.MultivariateNormal(q.loc.reshape(-1), scale_tril=torch.block_diag(*q.scale_tril))
        return super().inference_gap(x, q)

    def best_full(self, x: Tensor) -> dist.MultivariateNormal:
        r"""The best normals with full covariance for every row: batch ``[N]``, event ``[H]``.

        Within a row they are as free as the posterior, but no row follows another: means as the posterior's, precisions the
        diagonal blocks of :math:`\Lambda`. Of one latent a row they are the best independent ones.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``.
        """
        mean, precision = self._moments(x)
        latents = len(mean) // self.size
        blocks = precision.reshape(self.size, latents, self.size, latents).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return dist.MultivariateNormal(self._rows(mean), precision_matrix=blocks)

    def best_constant(self, x: Tensor) -> dist.TorchDistribution:
        """The best independent normals of which all rows have the same.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``.
        """
        return self.best_linear(x, x.new_zeros(self.size, 0))

    def best_linear(self, x: Tensor, inputs: Tensor) -> dist.TorchDistribution:
        """The best independent normals whose means are linear in the inputs of their row, with one scale for all rows.

        The coefficients and an intercept are shared by all rows: generalized least squares on the posterior means.

        Args:
            x: the observations of all rows, ``[N, D]`` or ``[N]``.
            inputs: ``[N, F]`` what an encoder reads of each row, such as a window of the observations around it.

        Raises:
            ValueError: if the inputs are not those of all rows.
        """
        mean, precision = self._moments(x)
        inputs = check_rows(inputs, inputs.shape[-1:], self.size).to(mean)
        latents = len(mean) // self.size
        ones = inputs.new_ones(self.size, 1)
        design = torch.kron(torch.cat([ones, inputs], 1), torch.eye(latents).to(mean))
        root = torch.linalg.cholesky(precision).T
        # The driver that allows for inputs that repeat each other.
        coefficients = torch.linalg.lstsq(root @ design, root @ mean.unsqueeze(-1), driver="gelsd").solution
        loc = self._rows((design @ coefficients).squeeze(-1))
        return self._normals(loc, self._shared_variance(precision).sqrt().expand_as(loc))

    def _shared_variance(self, precision: Tensor) -> Tensor:
        """``[H]`` the best variances that are the same for all rows."""
        return self._rows(precision.diagonal()).mean(0).reciprocal()

    def window_gap(self, half_width: int) -> Tensor:
        r"""``[]`` the amortization gap of the best inference function that sees a window, expected over the model's data.

        The function reads :math:`x_{n-w}, \dots, x_{n+w}`, with zeros beyond the ends, and is the same for all rows: a linear
        map to the means, and one scale. Of rows far from the ends no other function of the window does better.

        Args:
            half_width: ``w``; 0 is the row's own observation.

        Raises:
            ValueError: if ``half_width`` is negative.
        """
        if half_width < 0:
            raise ValueError(f"Expected half_width of at least 0, got {half_width}.")
        _, emission, scale = self._exact
        _, precision = self._moments(scale.new_zeros((self.size, *self._shapes[1])))
        covariance = self._covariance(scale)
        noise = torch.block_diag(*[(emission / scale.square().unsqueeze(-1)).T] * self.size)
        exact = torch.linalg.solve(precision, noise)
        # One map from all observations to all means for each coefficient: E_a shifts the series and picks one element.
        width = min(half_width, self.size - 1)
        shifts = [torch.ones(self.size - abs(j)).diag(j).to(scale) for j in range(-width, width + 1)]
        units = torch.eye(emission.numel()).to(scale).reshape(-1, *emission.T.shape)
        maps = torch.stack([torch.kron(shift, unit) for shift in shifts for unit in units])
        # E over x of (sum_a b_a E_a x - m)' Lambda (the same) is quadratic in the coefficients b.
        quadratic = torch.einsum("amn,bmn->ab", maps, precision @ maps @ covariance)
        target = precision @ exact @ covariance
        linear = torch.einsum("amn,mn->a", maps, target)
        explained = linear @ torch.linalg.lstsq(quadratic, linear.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        shared = self._shared_variance(precision).log().sum() * self.size + precision.diagonal().log().sum()
        return 0.5 * ((exact * target).sum() - explained - shared)
