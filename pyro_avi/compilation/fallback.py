"""Why something is evaluated eagerly and not compiled, and what is logged of it."""

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
    """Why a step is taken eagerly."""


# What torch says where a program reads a number out of a tensor, in its versions and in graphs of either kind.
_READ_OUT = ("data-dependent", "local_scalar_dense", "data dependent", "value out of a tracing tensor")


def reason_of(error: BaseException) -> str:
    """Why something could not be compiled, in a line, and where: what torch appends is pages long."""
    reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2]).removesuffix(".")
    if isinstance(error, CannotCompile):
        return reason
    if any(words in str(error).lower() for words in _READ_OUT):
        reason = "a number is read out of a tensor there, as by if, float() or .item(), which a graph cannot follow"
    place = _place_of(error)
    return reason if place is None else f"{place}: {reason}"


def _place_of(error: BaseException) -> str | None:
    """The line of the caller's own program that an error came from: the innermost outside of libraries and this package."""
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
    return [Path(__file__).parents[1], *(Path(module.__file__).parent for module in (torch, pyro)), *installed]


def log_graph(what: str, fallback: str | None = None) -> None:
    """Tell the logger ``pyro_avi``, at level INFO, that something is one graph, or that it is none though it was to be.

    Both round sums differently, so it is worth knowing of a number which of them it is from. What the arguments decide,
    as whether compiling pays, is not told.

    Args:
        what: "The training step" or the like, also the attribute ``what`` of the log's record.
        fallback: why it is evaluated eagerly all the same, also an attribute of the record.
    """
    how = "is one compiled graph" if fallback is None else f"is evaluated eagerly, not compiled: {fallback}"
    _LOG.info("%s %s.", what, how, extra={"what": what, "fallback": fallback})
