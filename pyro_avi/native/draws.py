"""The normal and uniform numbers of a step, drawn by vector instructions.

torch's generator on a CPU makes one number after another, 3.5 ns each. These are the same ones up to rounding, from the same
state, and leave the same state.
"""

import ctypes
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_avi.native.extension import build_extension
from pyro_avi.seeds import seeded

__all__ = ["Draw", "Drawing", "NativeDraws", "drawings_of", "natively"]

_SOURCE = Path(__file__).with_suffix(".cpp")
# Loops are vectorized where neither errors nor exceptions of arithmetic are asked for.
_OPTIONS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
# Random operations in place, and the two numbers that they take by default.
_RANDOM = {torch.ops.aten.normal_.default: (0.0, 1.0), torch.ops.aten.uniform_.default: (0.0, 1.0)}
_DTYPES = (torch.float32, torch.float64)
# Sizes with which a library is tried: alone, in pairs, in groups, and more than one block of words.
_TRIED = (1, 2, 16, 33, 700)


class Draw(ctypes.Structure):
    """What is drawn, as ``draws.cpp`` reads it."""

    _fields_ = (
        ("to", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("one", ctypes.c_double),
        ("two", ctypes.c_double),
        ("is_normal", ctypes.c_int32),
        ("is_double", ctypes.c_int32),
    )


class Drawing(NamedTuple):
    """One random operation.

    Attributes:
        operation: ``aten.normal_`` or ``aten.uniform_``.
        tensor: what it draws into.
        one, two: mean and scale, or the bounds.
    """

    operation: Any
    tensor: Tensor
    one: float
    two: float

    def draw(self) -> Draw:
        """For the library; the tensor has to outlive it."""
        return Draw(
            self.tensor.data_ptr(),
            self.tensor.numel(),
            self.one,
            self.two,
            self.operation == torch.ops.aten.normal_.default,
            self.tensor.dtype == torch.float64,
        )


class NativeDraws:
    """Makes all draws of a program in their order; the same tensors at every call.

    Args:
        drawings: the draws.
        draw_all: the function of the library.

    Attributes:
        draws: an array of :class:`Draw`.
        function: where the function is that fills such an array from a state of the generator, for other libraries.
    """

    def __init__(self, drawings: Sequence[Drawing], draw_all: Any):
        self._tensors, self._draw_all = [each.tensor for each in drawings], draw_all
        self.draws = (Draw * len(drawings))(*(each.draw() for each in drawings))
        self.function = ctypes.cast(draw_all, ctypes.c_void_p)

    def __call__(self) -> list[Tensor]:
        """Draw from torch's random state, and return what was drawn."""
        with self.state() as state:
            self._draw_all(state, self.draws, len(self.draws))
        return list(self._tensors)

    @staticmethod
    @contextmanager
    def state() -> Iterator[int]:
        """A context in which draws may change the memory of torch's random state, and where that memory is."""
        generator = torch.default_generator
        state = generator.get_state()
        try:
            yield state.data_ptr()
        finally:
            generator.set_state(state)


def drawings_of(program: GraphModule) -> list[Drawing] | None:
    """The random operations of a program in their order.

    ``None`` where it does anything else, or returns them in another order.
    """
    drawings, order = [], []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        into, *numbers = cast(tuple[Any, ...], node.args)
        if node.target not in _RANDOM or node.kwargs or into.op != "get_attr":
            return None
        values = [float(number) for number in (*numbers, *_RANDOM[node.target][len(numbers) :])]
        drawings.append(Drawing(node.target, program.get_buffer(into.target), *values))
        order.append(node)
    (output,) = program.graph.find_nodes(op="output")
    return drawings if list(cast(Any, output.args[0])) == order else None


def natively(program: GraphModule) -> NativeDraws | None:
    """The draws of a program by the library; ``None`` where it has others, or the library cannot be built here.

    Args:
        program: draws into tensors that it holds.
    """
    drawings = drawings_of(program)
    if drawings is None or not all(map(_is_drawn_so, drawings)) or (draw_all := _draw_all()) is None:
        return None
    return NativeDraws(drawings, draw_all)


def _is_drawn_so(drawing: Drawing) -> bool:
    tensor = drawing.tensor
    return tensor.device.type == "cpu" and tensor.dtype in _DTYPES and tensor.is_contiguous()


@cache
def _draw_all() -> Any:
    """The function of the library; ``None`` where it cannot be built, or does not draw as this version of torch does."""
    try:
        function = ctypes.CDLL(str(build_extension(_SOURCE, options=_OPTIONS))).draw_all
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.POINTER(Draw), ctypes.c_int64), None
    return function if _draws_as_torch(function) else None


def _draws_as_torch(draw_all: Any) -> bool:
    for operation in _RANDOM:
        for dtype in _DTYPES:
            drawings = [Drawing(operation, torch.empty(size, dtype=dtype), -0.5, 2.0) for size in _TRIED]
            with seeded(0):
                drawn = [each.clone() for each in NativeDraws(drawings, draw_all)()]
                left = torch.get_rng_state()
            with seeded(0):
                expected = [operation(torch.empty_like(each), -0.5, 2.0) for each in drawn]
                if not torch.equal(torch.get_rng_state(), left):
                    return False
            if not all(torch.allclose(*pair, rtol=1e-5, atol=1e-5) for pair in zip(drawn, expected, strict=True)):
                return False
    return True
