"""The precision of matrix products and convolutions; all other operations stay as they are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pyro_avi.tracing.operation_mode import OperationMode

__all__ = ["PRECISIONS", "matmul_precision", "with_matmul_precision"]

PRECISIONS = ("float32", "tf32", "bfloat16")

_aten = torch.ops.aten
# The operations below autograd that multiply matrices, forward and backward.
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.convolution.default,
    _aten.convolution_backward.default,
}
_SUMS = {_aten.addmm.default: _aten.mm.default, _aten.baddbmm.default: _aten.bmm.default}


class _BFloat16Products(OperationMode):
    """Rounds the factors of single-precision products to bfloat16, and returns the products in single precision."""

    def run(self, func, types, args, kwargs):
        if func in _SUMS and set(kwargs) <= {"alpha", "beta"}:
            product = self._product(_SUMS[func], args[1:], {})
            return args[0] * kwargs.get("beta", 1) + product * kwargs.get("alpha", 1)
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _product(func, args, kwargs):
        single = [x.dtype == torch.float32 for x in args if isinstance(x, Tensor)]
        if not all(single):
            return func(*args, **kwargs)
        out = func(*(x.bfloat16() if isinstance(x, Tensor) else x for x in args), **kwargs)
        if isinstance(out, Tensor):
            return out.float()
        return tuple(x.float() if isinstance(x, Tensor) else x for x in out)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """A context in which matrix products and convolutions are computed in this precision.

    Args:
        precision: ``"float32"`` as they are; ``"tf32"`` rounds the factors to 10 bits on CUDA; ``"bfloat16"`` to 7 bits.
    """
    if precision == "bfloat16":
        with _BFloat16Products():
            yield
    elif precision == "tf32":
        # A setting that is read when the kernel of a product is chosen; a traced graph does not contain it.
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    else:
        yield


def with_matmul_precision(precision: str, graph: Callable) -> Callable:
    """A compiled graph, called with the setting of its precision: bfloat16 is part of a graph, tf32 is a setting of kernels."""
    if precision != "tf32":
        return graph

    def called(*args):
        with matmul_precision(precision):
            return graph(*args)

    return called
