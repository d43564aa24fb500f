"""The machine that a cell runs on: its cores, names and memory, and what its processes inherit."""

import functools
import os
import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["device_name", "environment_defaults", "peak_memory", "processor_name", "reset_peak_memory", "usable_cores"]


def usable_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def reset_peak_memory(device: str) -> None:
    if device == "cuda":
        import torch

        # There are no statistics to reset before the first use of the device.
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # 5 resets the high-water mark of resident memory. Where a container forbids it, the mark is the process's.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """The most memory in bytes since :func:`reset_peak_memory`: of the device, or resident of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: str) -> str:
    """The name of the device, on a CPU that of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return processor_name()


@functools.cache
def processor_name() -> str:
    """The name of the processor."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def environment_defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Within the block these environment variables have values, those that the user has set excepted."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
