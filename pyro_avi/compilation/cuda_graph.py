"""Functions as CUDA graphs: one launch for all of their kernels."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GraphedFunction", "make_graphed", "warn_not_graphed"]


def make_graphed(
    function: Callable[..., Sequence[Tensor]], held: Sequence[Tensor], examples: Sequence[Tensor]
) -> tuple[Callable[..., Sequence[Tensor]], str | None]:
    """The function as a CUDA graph, if all tensors that it reads are on one CUDA device.

    Capturing calls it several times: the caller must roll back what it changes.

    Args:
        function: takes tensors like the examples.
        held: the tensors that it reads beside them, or changes in place.
        examples: the tensors of one call.

    Returns:
        The graphed function, or the function itself if it runs elsewhere or cannot be captured; and the reason if it cannot
        be captured, else ``None``.
    """
    devices = {x.device for x in (*held, *examples)}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return function, None
    try:
        return GraphedFunction(function, examples), None
    except RuntimeError as error:
        return function, " ".join(str(error).splitlines()[:1])


def warn_not_graphed(reason: str | None) -> None:
    """Warn that the kernels of a training step are launched one after another, if there is a reason to."""
    if reason is not None:
        warnings.warn(f"The kernels of the training step are launched one after another: {reason}.", stacklevel=3)


class GraphedFunction:
    """Launches all kernels of a function of CUDA tensors at once; Python code of the function is not run again.

    The draws of a call are those that the function itself would take from torch's random state. Every call returns the same
    tensors, which the next call overwrites.

    Args:
        function: takes tensors of the shapes and strides of the examples. It changes in place only tensors that outlive it,
            and does not wait for the device.
        examples: the arguments of the two calls in which it is captured.

    Raises:
        RuntimeError: if the function cannot be captured.

    References:
        Gray, "Getting started with CUDA graphs", 2019, https://developer.nvidia.com/blog/cuda-graphs/.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]):
        self._inputs = [x.detach().clone() for x in examples]
        for mine, x in zip(self._inputs, examples, strict=True):
            if mine.stride() != x.stride():
                raise RuntimeError("an argument has elements that share memory")
        self._copied: list[tuple[Tensor, int] | None] = [None] * len(self._inputs)
        # A first call may allocate and initialize, which cannot be captured; both calls run on a stream of their own.
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
            # The same tensor in the same version has been copied already.
            version = None if x.is_inference() else (x, x._version)
            last = self._copied[position]
            if version is None or last is None or last[0] is not x or last[1] != version[1]:
                mine.copy_(x)
                self._copied[position] = version
        self._graph.replay()
        return self._outputs
