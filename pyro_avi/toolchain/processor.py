"""What tells processors apart for which libraries are built."""

import platform
import re
from functools import cache
from pathlib import Path

__all__ = ["describe_processor"]

_LINES = re.compile(r"^(?:vendor_id|cpu family|model|flags|Features|CPU \w+)\s*:.*$", re.MULTILINE)


@cache
def describe_processor() -> list[str]:
    """Its family, model and instructions, as far as the system tells: a library for one of them may not run on another."""
    told = Path("/proc/cpuinfo")
    text = told.read_text().partition("\n\n")[0] if told.is_file() else platform.processor()
    return _LINES.findall(text) or [text]
