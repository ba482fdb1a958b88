"""What this machine is, in words."""

import contextlib
import os
import platform
from pathlib import Path


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Processor, cores and memory."""
    name, memory = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError, StopIteration, IndexError, ValueError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0])
        memory = f", {total / 2**20:.0f} GiB"
    return f"{name}, {cores()} cores{memory}; Python {platform.python_version()}"
