"""What a function does on a CUDA device, as one launch of all its kernels."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GraphedFunction", "make_graphed", "warn_not_graphed"]


def make_graphed(
    function: Callable[..., Sequence[Tensor]], held: Sequence[Tensor], examples: Sequence[Tensor]
) -> tuple[Callable[..., Sequence[Tensor]], str | None]:
    """The function with its kernels launched together, where all that it reads is on one CUDA device.

    It is called as often as capturing takes: what it changes is to be given back afterwards.

    Args:
        function: takes tensors as the examples are.
        held: what it reads, and changes in place, beside them.
        examples: of what it takes.

    Returns:
        The function itself where it runs elsewhere, or cannot be captured; and why it cannot, else ``None``.
    """
    devices = {x.device for x in (*held, *examples)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return function, None
    try:
        return GraphedFunction(function, examples), None
    except RuntimeError as error:
        return function, " ".join(str(error).splitlines()[:1])


def warn_not_graphed(apart: str | None) -> None:
    """Say why the kernels of a training step are launched one after another, if they are on a CUDA device."""
    if apart is not None:
        warnings.warn(f"The kernels of the training step are launched one after another: {apart}.", stacklevel=3)


class GraphedFunction:
    """Launches the kernels of a function of CUDA tensors together, and does nothing else of what the function does.

    The draws of a call are those that the function would take from torch's random state. The tensors that are returned
    are the same ones at every call, overwritten by the next.

    Args:
        function: takes tensors of the shapes and strides of the examples; it changes in place only what outlives it, and
            does not wait for the device.
        examples: what it is called with while it is captured, twice.

    Raises:
        RuntimeError: if what the function does cannot be captured.

    References:
        Gray, "Getting started with CUDA graphs", 2019, https://developer.nvidia.com/blog/cuda-graphs/.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]):
        self._inputs = [x.detach().clone() for x in examples]
        for mine, x in zip(self._inputs, examples, strict=True):
            if mine.stride() != x.stride():
                raise RuntimeError("an argument has elements that share memory")
        self._seen: list[tuple[Tensor, int] | None] = [None] * len(self._inputs)
        # What a first call sets up cannot be captured; capturing is done beside the current stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        """What the function returns for these tensors."""
        for position, (mine, x) in enumerate(zip(self._inputs, tensors, strict=True)):
            # Data that stay where they are and as they are have been copied before.
            seen = None if x.is_inference() else (x, x._version)
            last = self._seen[position]
            if seen is None or last is None or last[0] is not x or last[1] != seen[1]:
                mine.copy_(x)
                self._seen[position] = seen
        self._graph.replay()
        return self._outputs
