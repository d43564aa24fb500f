"""Errors that explain why a model cannot run on the data of a call: no tensors, no rows, or on another device."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_avi.errors import CallError, without_table

__all__ = ["NoRowsError", "NoTensorError", "OtherDeviceError", "check_observed", "explain_data_errors"]

_CONVERT = (
    "Convert arrays and data frames before the call: torch.as_tensor(x, dtype=torch.get_default_dtype()) for numbers, "
    "torch.as_tensor(k) for whole numbers."
)

# As torch says it of operations, and of shapes on its device "meta".
_TWO_DEVICES = re.compile("on the same device|not on the expected device")


class NoTensorError(TypeError):
    """The data of a call are not tensors."""


class NoRowsError(CallError):
    """A call has no rows."""


class OtherDeviceError(RuntimeError):
    """The data of a call, the model and the guide are not on one device."""


@runtime_checkable
class _HasArray(Protocol):
    """A NumPy array, or an object that converts to one, such as a data frame."""

    def __array__(self) -> Any: ...


def check_observed(site: str, value: Any) -> None:
    """Raise an error if an observed value is not a tensor.

    Args:
        site: the name of the site.
        value: what is observed there.

    Raises:
        NoTensorError: if it is not.
    """
    if not isinstance(value, Tensor):
        raise NoTensorError(
            f"Expected a tensor as the value observed at site {site!r}, got {_kind(value)}.\n{_CONVERT}"
        )


@contextmanager
def explain_data_errors(args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Replace errors of a model that runs inside by ones that explain what is wrong with its arguments.

    Args:
        args, kwargs: of the model.

    Raises:
        NoRowsError: instead of the division by zero of a Pyro plate without rows.
        NoTensorError: instead of the error that an array in place of a tensor led to.
        OtherDeviceError: instead of torch's error of tensors on two devices.
    """
    try:
        yield
    except ZeroDivisionError as error:
        if not _is_of_pyro(error.__traceback__):
            raise
        raise _no_rows(args, kwargs) from error
    except (NoTensorError, NoRowsError, OtherDeviceError):
        raise
    except RuntimeError as error:
        if not _TWO_DEVICES.search(str(error)):
            raise
        raise _other_device(args, kwargs, error) from error
    except (TypeError, AttributeError, ValueError) as error:
        arrays = [leaf for leaf in tree_leaves((args, dict(kwargs))) if _is_array(leaf)]
        if not arrays:
            raise
        raise NoTensorError(
            f"Expected tensors as arguments, got {', '.join(map(_kind, arrays))}, with which the model or guide fails: "
            f"{type(error).__name__}: {without_table(str(error))}\n{_CONVERT}"
        ) from error


def _no_rows(args: tuple, kwargs: Mapping[str, Any]) -> NoRowsError:
    """The error of a call whose plate has no rows."""
    shapes = [str(tuple(leaf.shape)) for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    found = f"arguments of shape {', '.join(shapes)}" if shapes else "none"
    return NoRowsError(
        f"Expected at least one row in every plate of the call, got {found}.\n"
        "Pyro has no plate without rows: leave out batches that are empty."
    )


def _other_device(args: tuple, kwargs: Mapping[str, Any], error: RuntimeError) -> OtherDeviceError:
    """The error of a call with tensors on two devices."""
    devices = sorted({str(leaf.device) for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)})
    return OtherDeviceError(
        f"Expected the arguments on the device of model and guide, got arguments on {', '.join(devices) or 'none'}, with "
        f"which the model or guide fails: {without_table(str(error))}\n"
        "Move the data, x.to(device), or the model and its guide, model.to(device) and guide.to(device). Tensors that a model "
        "makes itself take the device of its data, device=x.device."
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, _HasArray) and not isinstance(value, Tensor)


def _kind(value: Any) -> str:
    """A value's class, and the shape of an array."""
    name = (
        type(value).__name__
        if type(value).__module__ == "builtins"
        else f"{type(value).__module__}.{type(value).__name__}"
    )
    return f"a {name} of shape {tuple(value.__array__().shape)}" if _is_array(value) else f"a {name}"


def _is_of_pyro(traceback: TracebackType | None) -> bool:
    """Whether an error was raised by Pyro itself."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals["__name__"].partition(".")[0] == "pyro"
