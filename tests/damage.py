"""Files with damage of every kind, drawn by Hypothesis, and limits that reading them must not pass."""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

__all__ = ["EXAMPLES", "damaged", "limited", "search", "texts"]

EXAMPLES = [pytest.param(100, id="fast"), pytest.param(10_000, id="thorough", marks=pytest.mark.slow)]
_MEMORY = 2 << 30
_HUGE = [2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 10**9]


def search(check: Callable, *strategies: st.SearchStrategy, examples: int) -> None:
    """Call a check with so many examples, the same in every run.

    Args:
        check: raises what is wrong.
        *strategies: of its arguments.
        examples: their number.
    """
    options = {"max_examples": examples, "derandomize": True, "deadline": None, "database": None}

    @settings(**options, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def one(values):
        check(*values)

    with limited():
        one()


@contextmanager
def limited() -> Iterator[None]:
    """Within the block to take more than 2 GiB of further memory is an error."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@st.composite
def damaged(draw, content: bytes, foreign: bytes = b"") -> bytes:
    """The content with up to three damages: flipped bits, cuts, repetitions, other content, numbers that are huge.

    Args:
        content: a whole file.
        foreign: another one.
    """
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        until = draw(st.integers(at, len(content)))
        match draw(st.sampled_from(["flip", "cut", "drop", "repeat", "foreign", "bytes", "huge", "digits"])):
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "drop":
                content = content[:at] + content[until:]
            case "repeat":
                content = content[:until] + content[at:]
            case "foreign":
                content = content[:at] + foreign[at:]
            case "bytes":
                content = content[:at] + draw(st.binary(max_size=12)) + content[at:]
            case "huge":
                order, size = draw(st.sampled_from(["big", "little"])), draw(st.sampled_from([4, 8]))
                number = draw(st.sampled_from(_HUGE)).to_bytes(8, order)[
                    slice(-size, None) if order == "big" else slice(size)
                ]
                content = content[:at] + number + content[at + size :]
            case "digits":
                content = content[:at] + str(draw(st.sampled_from(_HUGE))).encode() + content[at:]
    return content


def texts() -> st.SearchStrategy:
    """What may stand for a value of plain data: of every kind, and far outside of what is sensible."""
    numbers = st.sampled_from([*_HUGE, -1, 0, 1, 2, 5, 0.5, -0.0, 1e308])
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(["", "x", "../../pwn", "os.system", "cpu"]))
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
