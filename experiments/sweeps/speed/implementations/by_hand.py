"""The step as one writes it in PyTorch for this model and this guide alone, and the matrix products of it."""

import itertools
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from experiments.sweeps.speed.implementations.workload import LR, Workload
from experiments.sweeps.speed.rounds import Rounds

__all__ = ["Loss", "by_hand", "captured", "products"]


class Loss(nn.Module):
    """The loss as one writes it for this model and this guide alone."""

    def __init__(self, workload: Workload):
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


def by_hand(workload: Workload, rounds: Rounds, *, compiled: bool) -> None:
    """A step of Adam on `Loss`, eager or as one compiled graph."""
    loss = Loss(workload).to(workload.device)
    adam = torch.optim.Adam(loss.parameters(), lr=LR, fused=not compiled, capturable=compiled)
    calls = workload.calls()

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
    count = torch.zeros(1, device=workload.device)

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
                parameter.sub_(LR * first / (1 - 0.9**count) / scale)
        return value.detach()

    from torch.fx.experimental.proxy_tensor import make_fx

    values, moments = [s[0] for s in states], [s[1:] for s in states]
    graph = make_fx(whole)(values, moments, count, *next(calls))
    step = torch.compile(graph, fullgraph=True, dynamic=False, options={"fallback_random": True})
    with torch.no_grad():
        rounds.run(lambda: step(values, moments, count, *next(calls)))


def captured(workload: Workload, rounds: Rounds) -> None:
    """The eager step by hand, captured by hand as one CUDA graph."""
    loss = Loss(workload).to(workload.device)
    adam = torch.optim.Adam(loss.parameters(), lr=LR, fused=True, capturable=True)
    calls = workload.calls()
    inputs = [tensor.clone() for tensor in next(calls)]

    def move() -> None:
        loss(*inputs).backward()
        adam.step()

    # First on a stream beside the usual one: what allocates and initializes cannot be captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            adam.zero_grad()
            move()
    torch.cuda.current_stream().wait_stream(side)
    # The gradients are to be allocated in the memory of the graph.
    adam.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()

    def step() -> None:
        # A full batch is the same at every step.
        for mine, given in zip(inputs, next(calls) if workload.batch < workload.size else (), strict=False):
            mine.copy_(given)
        graph.replay()

    rounds.run(step)


def products(workload: Workload, rounds: Rounds) -> None:
    """The matrix products of a step, forward and backward, and nothing else; each by the library that is faster at it."""
    shapes = [(i, o, True) for i, o in itertools.pairwise(workload.widths)]
    if workload.kind == "amortized":
        # The images take no gradient.
        shapes += [(workload.num_pixels, workload.width, False), (workload.width, 2 * workload.latent_dim, True)]
    rows, made = workload.batch, partial(torch.randn, device=workload.device)
    pairs = []
    for i, o, inner in shapes:
        x, w, g = made(rows, i), made(i, o), made(rows, o)
        pairs += [(x, w), (x.T, g), (g, w.T)] if inner else [(x, w), (x.T, g)]
    chosen = [min(_libraries(*pair), key=_seconds) for pair in pairs]

    def step():
        for product in chosen:
            product()

    rounds.run(step)


def _libraries(one: Tensor, two: Tensor) -> list[Callable[[], Tensor]]:
    """A product by torch's own choice of library, and on a CPU by oneDNN."""
    usual = partial(torch.mm, one, two)
    if one.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return [usual]
    return [usual, partial(torch.ops.mkldnn._linear_pointwise, one, two.T, None, "none", [], "")]


def _seconds(product: Callable[[], Tensor]) -> float:
    """The processor time of a product, the least of three."""
    times = []
    for _ in range(4):
        start = time.process_time()
        product()
        times.append(time.process_time() - start)
    # The first one allocates.
    return min(times[1:])
