"""The semi-amortized guide: a network predicts each row's factor, and a few steps along the row's bound improve it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_avi.calls.call_reader import CallData
from pyro_avi.errors import check_count
from pyro_avi.guide_bases.global_values import globals_by_site
from pyro_avi.guides.amortized import AmortizedGuide, Encoder, Key
from pyro_avi.guides.fixed_points import FixedPoints, balanced_signs
from pyro_avi.rows.subsample import Subsample
from pyro_avi.seeds import seeded

__all__ = ["SemiAmortizedGuide"]

# What the Fisher information of a parameter counts at least.
_LEAST_FISHER = 1e-12


class SemiAmortizedGuide(AmortizedGuide):
    r"""A guide that predicts every row's factor and improves it by a few steps along the row's own bound (SA-VI).

    .. math:: \lambda_n^{(0)} = f(n, x_n), \qquad \lambda_n^{(t+1)} = \lambda_n^{(t)} + \alpha \, F(\lambda_n^{(t)})^{-1}
              \nabla_\lambda \mathrm{ELBO}_n(\lambda_n^{(t)}), \qquad t = 0, \dots, k - 1

    with the network of an :class:`~pyro_avi.AmortizedGuide` as :math:`f` and the diagonal :math:`F` of the Fisher information
    of the row's factor. A parameter moves by its factor's own scale at most in a step, :math:`F_{pp}^{-1/2}`. Rows are as
    independent of one another as the model makes them, and new rows are improved like others.

    The steps are part of the inference function: training differentiates through them, and encoder, step size and the
    parameters of the model have the gradient of the bound at the last factor. The mean over a factor is taken at a few fixed
    points, the same for all rows, so that the same row always has the same factor; the bound that is trained is that of the
    last factor by fresh draws, as of every guide. Global latents are held at their medians, with ``reads_globals="draw"`` at
    their values in the same draw. The model is run with its modules in evaluation mode, ``num_points`` times a step.

    Args:
        model: any Pyro callable whose local latents are continuous and whose log joint is a function of its latents.
        encoder: as for :class:`~pyro_avi.AmortizedGuide`.
        num_steps: ``k``, at least 1.
        step_size: :math:`\alpha`, where it starts.
        learn_step_size: whether it is trained, by its logarithm, with the network's parameters.
        num_points: how many points the mean over a factor is taken at, an even number: locations moved by one standard
            deviation in all coordinates, and the mirror images of these. The means of log joints of third degree are exact
            with twice as many points as latents (rounded up to a power of two), the gradient in the location of quadratic
            ones with two.
        **kwargs: all other options of :class:`~pyro_avi.AmortizedGuide`. The family is one of normals with a formula of its
            Fisher information, :class:`~pyro_avi.DiagonalNormal` or :class:`~pyro_avi.MultivariateNormal`.

    Raises:
        ValueError: if there is no step to take, the step size is not positive, the number of points is odd, the family or a
            latent is of another kind, or the log joint is random.

    References:
        Kim, Wiseman, Miller, Sontag and Rush, "Semi-Amortized Variational Autoencoders", 2018,
        https://arxiv.org/abs/1802.02550.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.SemiAmortizedGuide(model, encoder=(32,), num_steps=3).setup(x)
        >>> guide.posterior(torch.rand(7, 1, 8, 8)).batch_shape
        torch.Size([7])
        >>> guide.step_size
        tensor(0.5000, grad_fn=<ExpBackward0>)
    """

    def __init__(
        self,
        model: Callable,
        encoder: Encoder | Mapping[Key, Encoder] = (64, 64),
        *,
        num_steps: int = 4,
        step_size: float = 0.5,
        learn_step_size: bool = True,
        num_points: int = 4,
        **kwargs,
    ):
        super().__init__(model, encoder, **kwargs)
        if num_steps == 0:
            raise ValueError("Expected num_steps of at least 1, got 0.\nAn AmortizedGuide is one that takes no steps.")
        check_count("num_steps", num_steps)
        check_count("num_points", num_points)
        if num_points % 2:
            raise ValueError(f"Expected num_points= to be even, each with its mirror image, got {num_points}.")
        if not 0 < step_size < math.inf:
            raise ValueError(f"Expected step_size= to be a positive number, got {step_size!r}.")
        self.num_steps, self.num_points = num_steps, num_points
        self._step_size, self._learn_step_size = float(step_size), bool(learn_step_size)
        self._enumeration_depth: int | None = None

    @property
    def step_size(self) -> Tensor | dict[tuple[str, ...], Tensor]:
        """The step size, ``[]``; by plates where there are several row sets."""
        return self._by_row_set(lambda row_factor: row_factor.function.log_step_size.exp())

    def describe(self, *args, **kwargs):
        """As for every guide, with the options of the steps."""
        return {
            **super().describe(*args, **kwargs),
            "num_steps": self.num_steps,
            "num_points": self.num_points,
            "step_size": self._step_size,
            "learn_step_size": self._learn_step_size,
        }

    def _create_function(self, row_factor, initial, data, args, kwargs):
        self._check_factor(row_factor, initial)
        network = super()._create_function(row_factor, initial, data, args, kwargs)
        log_step_size = initial.new_tensor(math.log(self._step_size))
        if self._learn_step_size:
            network.log_step_size = nn.Parameter(log_step_size)
        else:
            network.register_buffer("log_step_size", log_step_size)
        points = balanced_signs(self.num_points, row_factor.factor.num_latents).to(initial)
        network.register_buffer("points", points, persistent=False)
        return network

    @staticmethod
    def _check_factor(row_factor, initial: Tensor) -> None:
        discrete = [latent.name for latent in row_factor.row_set.latents if latent.num_values is not None]
        if discrete:
            raise ValueError(
                f"Expected continuous latents of rows, got the discrete {discrete}, along which there is no gradient.\n"
                'Sum them out in the model, infer={"enumerate": "parallel"}, or take an AmortizedGuide.'
            )
        family = row_factor.factor.family
        is_normal = family.independent or hasattr(row_factor.factor.distribution(initial), "scale_tril")
        if row_factor.factor.fisher(initial) is None or not is_normal:
            raise ValueError(
                f"Expected a family of normals with a formula of its Fisher information, by which steps are scaled, got "
                f"{family!r}.\nTake DiagonalNormal() or MultivariateNormal(), or an AmortizedGuide and avi.refine."
            )

    def _check_call(self, data, args, kwargs):
        if not self.row_factors:
            return
        (data, _), *_ = self._runs(data, args, kwargs)
        parameters = [
            # Any values do.
            row_factor.factor.initial(self._init_scale).flatten(0, -2)[0].expand(*_sizes(row_factor, data), -1)
            for row_factor in self.row_factors
        ]
        noise = [row_factor.function.points[:1] for row_factor in self.row_factors]
        bound = self._points_of(data, args, kwargs)
        self._enumeration_depth = bound.enumeration_depth(parameters, noise)
        bound = replace(bound, depth=self._enumeration_depth)
        with seeded(0):
            first = bound.bound(parameters, noise)
        with seeded(1):
            second = bound.bound(parameters, noise)
        if not torch.allclose(first, second, equal_nan=True):
            raise ValueError(
                "Expected a model whose log joint is a function of its latents, got other values in a second run at the same "
                "latents.\nIn a list of guides, whose parts do not know the other latents, take an AmortizedGuide."
            )

    def _infer(self, row_factor, data, args, kwargs):
        return self._infer_all(data, args, kwargs)[list(self.row_factors).index(row_factor)]

    def _infer_all(self, data, args, kwargs):
        if not self.row_factors:
            return []
        # A step moves all sets of rows together, by one bound.
        parameters = [super(SemiAmortizedGuide, self)._infer(each, data, args, kwargs) for each in self.row_factors]
        if torch.jit.is_tracing():
            raise ValueError(
                "Expected a call outside of torch.jit.trace, whose graphs have no gradients inside, got one in it.\n"
                "Take the ELBO without Jit, or avi.fit(compile=True), which traces by other means."
            )
        results = []
        for part, rows in self._runs(data, args, kwargs):
            of_rows = parameters if rows is None else [x[rows] for x in parameters]
            results.append(self._take_steps(of_rows, part, args, kwargs))
        # The last run may have been filled up with rows of the first.
        return [torch.cat(each)[: len(x)] for each, x in zip(zip(*results, strict=True), parameters, strict=True)]

    def _runs(self, data: CallData, args, kwargs) -> list[tuple[CallData, Tensor | None]]:
        """The data of the model's runs for the rows of a call, and their positions among these; ``None`` for all in one.

        A model that draws its rows runs with as many as it draws.
        """
        # Plates that are given have the rows of the call.
        is_given = self.create_plates is not None or self.master is not None
        call = None if self._reader is None or is_given else self._reader.call(args, kwargs)
        drawn = {} if call is None else {name: each for name, each in call.drawn.items() if name in data.rows}
        rows = dict(data.rows)
        for name, (size, count) in drawn.items():
            if rows[name].index is None and len(rows[name]) == count < size:
                # A batch without known positions counts as a part of the plate, whichever.
                rows[name] = Subsample(size, torch.arange(count, device=self._device))
        data = replace(data, rows=rows)
        more = [name for name, (_, count) in drawn.items() if count < len(rows[name])]
        if call is None or not more:
            return [(data, None)]
        if len(self._structure.frames) > 1:
            raise ValueError(
                f"Expected rows of one plate where the model draws them, got those of {tuple(self._structure.frames)}.\n"
                "Pass the positions of the rows of a call: pyro.plate(name, size, subsample=index)."
            )
        ((name, (size, count)),) = drawn.items()
        every = torch.arange(size, device=self._device)
        filled = torch.cat([every, every[: -size % count]]).split(count)
        parts: list[tuple[CallData, Tensor | None]]
        parts = [(replace(call.read({name: index}), draws=data.draws), index) for index in filled]
        return parts

    def _take_steps(self, parameters: Sequence[Tensor], data: CallData, args, kwargs) -> list[Tensor]:
        """The parameters ``[*B, P]`` after all steps of the rows that the model runs with."""
        is_trained = torch.is_grad_enabled()
        noise = [row_factor.function.points for row_factor in self.row_factors]
        with torch.enable_grad():
            points = self._points_of(data, args, kwargs)
            for _ in range(self.num_steps):
                parameters = [x if is_trained and x.requires_grad else x.detach().requires_grad_() for x in parameters]
                bound = points.bound(parameters, noise)
                gradients = torch.autograd.grad(bound, parameters, create_graph=is_trained)
                parameters = [
                    self._moved(each, x, gradient, data)
                    for each, x, gradient in zip(self.row_factors, parameters, gradients, strict=True)
                ]
        return [x if is_trained else x.detach() for x in parameters]

    @staticmethod
    def _moved(row_factor, parameters: Tensor, gradient: Tensor, data: CallData) -> Tensor:
        """The parameters after a step."""
        # A row of a batch counts as often as the plate's scale says, and its own bound once.
        rows = [data.rows[name] for name in row_factor.row_set.plates]
        counts = math.prod(each.size / len(each) for each in rows)
        fisher = row_factor.factor.fisher(parameters).clamp(min=_LEAST_FISHER)
        longest = fisher.rsqrt()
        step = row_factor.function.log_step_size.exp() * gradient / (counts * fisher)
        return parameters + torch.minimum(torch.maximum(step, -longest), longest)

    def _points_of(self, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> FixedPoints:
        structure = self._structure
        plates = {}
        with poutine.block():
            for name, frame in structure.frames.items():
                rows: Subsample = data.rows[name]
                size = None if name in structure.without_size else rows.size
                plates[name] = pyro.plate(name, size, subsample=rows.index, dim=frame.dim)
        plates = self._plates(self._frames(), plates, structure.without_size)
        known = self._known_globals(data, args, kwargs) if structure.global_latents else {}
        return FixedPoints(
            self.model,
            args,
            kwargs,
            list(self.row_factors),
            structure.order,
            plates,
            data,
            known,
            self._enumeration_depth,
        )

    def _known_globals(self, data: CallData, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        try:
            # Pyro's guides answer by a call of themselves.
            with poutine.block():
                return globals_by_site(self._structure, self.global_guide, data, args, kwargs)
        # Guides written by hand know none, or none of some latent.
        except (NotImplementedError, KeyError) as error:
            raise ValueError(
                "Expected a guide of the global latents that knows its median, at which they are held in the steps, got "
                f"{type(self.global_guide).__name__}.\nTake one of Pyro's automatic guides, or an AmortizedGuide."
            ) from error


def _sizes(row_factor, data: CallData) -> list[int]:
    """``[*B]`` the numbers of rows of a call."""
    return [len(data.rows[name]) for name in row_factor.row_set.plates]
