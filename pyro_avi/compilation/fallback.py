"""Why a function is evaluated eagerly and not compiled, and the log of it."""

import linecache
import logging
import sysconfig
import traceback
from functools import cache
from pathlib import Path

import pyro
import torch

__all__ = ["CannotCompile", "log_graph", "reason_of"]

_LOG = logging.getLogger("pyro_avi")


class CannotCompile(Exception):
    """A function cannot be compiled; the message says why."""


# Words in torch's errors about a number that is read out of a tensor, in its various versions and tracers.
_READ_OUT = ("data-dependent", "local_scalar_dense", "data dependent", "value out of a tracing tensor")


def reason_of(error: BaseException) -> str:
    """Why and where something could not be compiled, in one line of an error that in torch is pages long."""
    reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2]).removesuffix(".")
    if isinstance(error, CannotCompile):
        return reason
    if any(words in str(error).lower() for words in _READ_OUT):
        reason = "a number is read out of a tensor there, as by if, float() or .item(), which a graph cannot follow"
    place = _place_of(error)
    return reason if place is None else f"{place}: {reason}"


def _place_of(error: BaseException) -> str | None:
    """The line of the user's program that an error came from: the innermost frame outside of libraries and this package."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in _libraries()):
            text = linecache.getline(str(path), line).strip()
            found = f"{path}:{line}, `{text}`"
    return found


@cache
def _libraries() -> list[Path]:
    installed = [Path(folder) for folder in sysconfig.get_paths().values()]
    return [Path(__file__).parents[1], *(Path(str(module.__file__)).parent for module in (torch, pyro)), *installed]


def log_graph(what: str, fallback: str | None = None) -> None:
    """Log at level INFO, with the logger ``pyro_avi``, that something was compiled, or could not be.

    A graph rounds sums differently, so that it matters for a number which of the two it is from. That compiling was not
    tried, because it would save no time, is not logged: it follows from the arguments.

    Args:
        what: "The training step" or the like; also the attribute ``what`` of the log record.
        fallback: why it is evaluated eagerly although it was to be compiled; also an attribute of the record.
    """
    how = "is one compiled graph" if fallback is None else f"is evaluated eagerly, not compiled: {fallback}"
    _LOG.info("%s %s.", what, how, extra={"what": what, "fallback": fallback})
