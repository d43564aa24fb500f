"""One training step in several ways: by the library, by hand, by Pyro, by NumPyro, and its matrix products alone.

The model has images for rows: z_n ~ N(0, I), theta ~ N(0, I), x_n ~ N(decoder(z_n; theta), 1). Every way trains it by the
same guide, by Adam, with closed-form divergences, except for Pyro's SVI, which is taken as people write it. There is no
JitTrace_ELBO among them: torch.jit cannot trace a decoder whose weights are given to it (``torch.func.functional_call``).
"""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_avi as avi
from experiments.turns import Rounds

__all__ = ["take"]

_LR = 1e-3


class _Workload:
    """What is trained: sizes, data, calls, and layers of the decoder."""

    def __init__(self, settings: Mapping[str, Any]):
        self.size, self.batch = settings["num_rows"], settings["batch_size"]
        self.kind, self.width = settings["guide"], settings["width"]
        self.latent_dim = settings["latent_dim"]
        self.layers, self.num_pixels = tuple(settings["layers"]), settings["pixels"]
        torch.manual_seed(settings["seed"])
        self.made = settings["made"]
        # Rows that are made as they are needed: the table of the guide is what grows.
        self.x = torch.rand(self.batch if self.made else self.size, self.num_pixels)

    def calls(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if self.made:
            # Different rows all over the table; the stride is a prime.
            rows = 9973 * torch.arange(self.batch)
            return ((self.x, (rows + int(torch.randint(self.size, ()))) % self.size) for _ in itertools.count())
        if self.batch == self.size:
            return itertools.repeat((self.x, torch.arange(self.size)))
        return avi.minibatches(self.x, batch_size=self.batch, seed=seed)

    def full_calls(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Those with all rows of a batch: the smaller last one of an epoch would need a graph of its own."""
        return (call for call in self.calls(seed) if len(call[1]) == self.batch)

    @property
    def widths(self) -> list[int]:
        return [self.latent_dim, *self.layers, self.num_pixels]

    def model_and_guide(self):
        decoder = avi.models.DenseDecoder(self.latent_dim, self.layers, (self.num_pixels,))
        likelihood = avi.models.GaussianLikelihood(1.0, learned=False)
        model = avi.models.BayesianDecoder(decoder, size=self.size, likelihood=likelihood)
        kinds = {"constant": avi.ConstantGuide, "factorized": avi.FactorizedGuide}
        if self.kind == "amortized":
            return model, avi.AmortizedGuide(model, encoder=(self.width,), standardize=False)
        return model, kinds[self.kind](model)


def take(way: str, settings: Mapping[str, Any], rounds: Rounds) -> None:
    """Take steps in one way until there are no more turns.

    Args:
        way: its name.
        settings: of a cell of the sweep ``speed``.
        rounds: gives the turns.
    """
    _WAYS[way](_Workload(settings), rounds)


def _fit(workload: _Workload, rounds: Rounds, **options) -> None:
    model, guide = workload.model_and_guide()
    calls = workload.full_calls()
    # A full batch needs no positions.
    if workload.batch == workload.size:
        calls = itertools.repeat((workload.x,))
    avi.fit(
        model,
        guide,
        batches=calls,
        num_steps=1_000_000,
        lr=_LR,
        elbo=TraceMeanField_ELBO(),
        progress=False,
        callbacks=[rounds],
        **options,
    )


def _five(workload: _Workload, rounds: Rounds) -> None:
    """A step of five models and guides at once."""
    batches = [workload.full_calls(seed) for seed in range(5)]
    avi.fit_many(
        [workload.model_and_guide() for _ in batches],
        batches=batches,
        num_steps=1_000_000,
        lr=_LR,
        elbo=TraceMeanField_ELBO(),
        seed=list(range(5)),
        progress=False,
        callbacks=[rounds],
    )


def _svi(workload: _Workload, rounds: Rounds) -> None:
    model, guide = workload.model_and_guide()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": _LR}), Trace_ELBO())
    calls = workload.calls()
    guide.setup(*next(calls))
    with pyro.validation_enabled(False):
        rounds.run(lambda: svi.step(*next(calls)))


class _ByHand(nn.Module):
    """The loss as one writes it for this model and this guide alone."""

    def __init__(self, workload: _Workload):
        super().__init__()
        self.workload = workload
        widths = workload.widths
        sizes = [(i, o) for i, o in itertools.pairwise(widths)]
        self.shapes = [shape for i, o in sizes for shape in ((o, i), (o,))]
        self.counts = [torch.Size(shape).numel() for shape in self.shapes]
        self.theta = nn.Parameter(
            torch.cat([0.05 * torch.randn(sum(self.counts)), torch.full((sum(self.counts),), -2.0)])
        )
        double = 2 * workload.latent_dim
        if workload.kind == "amortized":
            self.encoder = nn.Sequential(nn.Linear(workload.num_pixels, workload.width), nn.SiLU())
            self.head = nn.Linear(workload.width, double)
        else:
            rows = (workload.size,) if workload.kind == "factorized" else ()
            self.vector = nn.Parameter(torch.zeros(*rows, double))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        w = self.workload
        loc, log_scale = self.theta.chunk(2)
        theta = loc + log_scale.exp() * torch.randn_like(loc)
        kl_global = 0.5 * (loc**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
        if w.kind == "amortized":
            parameters = self.head(self.encoder(x))
        elif w.kind == "factorized":
            parameters = self.vector if w.batch == w.size else self.vector[index]
        else:
            parameters = self.vector.expand(len(x), -1)
        loc, log_scale = parameters.chunk(2, -1)
        scale = log_scale.exp()
        hidden = loc + scale * torch.randn_like(loc)
        kl = 0.5 * (loc**2 + scale**2 - 1 - 2 * log_scale).sum()
        weights = [part.view(shape) for part, shape in zip(theta.split(self.counts), self.shapes, strict=True)]
        for i in range(0, len(weights), 2):
            hidden = nn.functional.linear(hidden, weights[i], weights[i + 1])
            if i + 2 < len(weights):
                hidden = nn.functional.leaky_relu(hidden)
        error = 0.5 * ((x - hidden) ** 2).sum() + 0.5 * x.numel() * 1.8378770664093453
        return kl_global + (error + kl) * (w.size / len(x))


def _by_hand(workload: _Workload, rounds: Rounds, *, compiled: bool) -> None:
    loss = _ByHand(workload)
    adam = torch.optim.Adam(loss.parameters(), lr=_LR, fused=not compiled, capturable=compiled)
    calls = workload.full_calls()

    def move(x: Tensor, index: Tensor) -> Tensor:
        adam.zero_grad()
        value = loss(x, index)
        value.backward()
        adam.step()
        return value

    if not compiled:
        rounds.run(lambda: move(*next(calls)))
        return
    states = [(p.detach(), torch.zeros_like(p), torch.zeros_like(p)) for p in loss.parameters()]
    count = torch.zeros(1)

    def whole(values, moments, count, x, index):
        own = [value.detach().requires_grad_() for value in values]
        value = torch.func.functional_call(loss, dict(zip(dict(loss.named_parameters()), own, strict=True)), (x, index))
        grads = torch.autograd.grad(value, own)
        with torch.no_grad():
            count.add_(1)
            for parameter, (first, second), grad in zip(values, moments, grads, strict=True):
                first.lerp_(grad, 0.1)
                second.lerp_(grad * grad, 0.001)
                scale = (second / (1 - 0.999**count)).sqrt().add(1e-8)
                parameter.sub_(_LR * first / (1 - 0.9**count) / scale)
        return value.detach()

    from torch.fx.experimental.proxy_tensor import make_fx

    values, moments = [s[0] for s in states], [s[1:] for s in states]
    graph = make_fx(whole)(values, moments, count, *next(calls))
    step = torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})
    with torch.no_grad():
        rounds.run(lambda: step(values, moments, count, *next(calls)))


def _products(workload: _Workload, rounds: Rounds) -> None:
    """The matrix products of a step, forward and backward, and nothing else."""
    shapes = [(i, o, True) for i, o in itertools.pairwise(workload.widths)]
    if workload.kind == "amortized":
        # The images take no gradient.
        shapes += [(workload.num_pixels, workload.width, False), (workload.width, 2 * workload.latent_dim, True)]
    rows = workload.batch
    operands = [(torch.randn(rows, i), torch.randn(i, o), torch.randn(rows, o), inner) for i, o, inner in shapes]

    def step():
        for x, w, g, inner in operands:
            x @ w
            x.T @ g
            if inner:
                g @ w.T

    rounds.run(step)


def _numpyro(workload: _Workload, rounds: Rounds) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as ndist
    from numpyro.infer import SVI as NumPyroSVI
    from numpyro.infer import TraceMeanField_ELBO as NumPyroELBO

    w, x = workload, jnp.asarray(workload.x.numpy())
    widths = w.widths
    shapes = [shape for i, o in itertools.pairwise(widths) for shape in ((i, o), (o,))]
    counts = [int(np.prod(shape)) for shape in shapes]
    total, ends = sum(counts), list(itertools.accumulate(counts))[:-1]
    key = jax.random.PRNGKey(0)

    def model(x, index):
        theta = numpyro.sample("theta", ndist.Normal(jnp.zeros(total), 1.0).to_event(1))
        with numpyro.plate("data", w.size, subsample_size=len(x)):
            hidden = numpyro.sample("z", ndist.Normal(jnp.zeros(w.latent_dim), 1.0).to_event(1))
            weights = [part.reshape(shape) for part, shape in zip(jnp.split(theta, ends), shapes, strict=True)]
            for i in range(0, len(weights), 2):
                hidden = hidden @ weights[i] + weights[i + 1]
                hidden = jax.nn.leaky_relu(hidden) if i + 2 < len(weights) else hidden
            numpyro.sample("x", ndist.Normal(hidden, 1.0).to_event(1), obs=x)

    def guide(x, index):
        loc = numpyro.param("loc", 0.05 * jax.random.normal(key, (total,)))
        numpyro.sample(
            "theta", ndist.Normal(loc, jnp.exp(numpyro.param("log_scale", jnp.full(total, -2.0)))).to_event(1)
        )
        double = 2 * w.latent_dim
        if w.kind == "amortized":
            first = numpyro.param("first", 0.03 * jax.random.normal(key, (w.num_pixels, w.width)))
            head = numpyro.param("head", jnp.zeros((w.width, double)))
            hidden = jax.nn.silu(x @ first + numpyro.param("first_bias", jnp.zeros(w.width)))
            parameters = hidden @ head + numpyro.param("head_bias", jnp.zeros(double))
        elif w.kind == "factorized":
            table = numpyro.param("table", jnp.zeros((w.size, double)))
            parameters = table if w.batch == w.size else table[index]
        else:
            parameters = jnp.broadcast_to(numpyro.param("vector", jnp.zeros(double)), (len(x), double))
        loc, log_scale = jnp.split(parameters, 2, -1)
        with numpyro.plate("data", w.size, subsample_size=len(x)):
            numpyro.sample("z", ndist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    svi = NumPyroSVI(model, guide, numpyro.optim.Adam(_LR), NumPyroELBO())
    generator = np.random.default_rng(0)

    @jax.jit
    def many(state, batches):
        def step(state, index):
            rows = x if w.batch == w.size else x[index]
            return svi.update(state, rows, index)

        return jax.lax.scan(step, state, batches)

    def draw(count: int):
        if w.batch == w.size:
            return jnp.broadcast_to(jnp.arange(w.size), (count, w.size))
        return jnp.asarray(np.stack([generator.permutation(w.size)[: w.batch] for _ in range(count)]))

    state = svi.init(key, x[: w.batch], jnp.arange(w.batch))

    def steps(count: int) -> None:
        nonlocal state
        state, losses = many(state, draw(count))
        losses.block_until_ready()

    rounds.run_many(steps)


_WAYS = {
    "compiled": partial(_fit, compile=True),
    "bfloat16": partial(_fit, compile=True, precision="bfloat16"),
    "five at once": _five,
    "eager": partial(_fit, compile=False),
    "hand": partial(_by_hand, compiled=False),
    "hand compiled": partial(_by_hand, compiled=True),
    "svi": _svi,
    "numpyro": _numpyro,
    "products": _products,
}
