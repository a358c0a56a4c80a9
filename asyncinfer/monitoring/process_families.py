"""What the system says about this process, under the names that Prometheus gives it everywhere."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.monitoring.exposition import Family, counter, gauge

_PROC: Final = Path("/proc")
_START_FIELD: Final = 19
"""Of the fields after the program's name in `stat`: when the process started, in clock ticks."""


def process_families() -> Iterator[Family]:
    """CPU time, and on Linux also memory, open files and the time of the start."""
    yield counter("process_cpu_seconds", "CPU time of this process.", (), {(): time.process_time()})
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        yield from _linux_families()


def _linux_families() -> Iterator[Family]:
    """What `/proc` says; raises OSError, ValueError, IndexError or StopIteration without one."""
    pages = (_PROC / "self/statm").read_text().split()
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    yield gauge(
        "process_resident_memory_bytes", "Its memory in RAM.", (), {(): int(pages[1]) * page_bytes}
    )
    yield gauge(
        "process_virtual_memory_bytes", "Its address space.", (), {(): int(pages[0]) * page_bytes}
    )
    yield gauge(
        "process_open_fds", "Files that it has open.", (), {(): len(os.listdir("/proc/self/fd"))}
    )
    limits = (_PROC / "self/limits").read_text().splitlines()
    open_files = next(line for line in limits if line.startswith("Max open files"))
    yield gauge(
        "process_max_fds", "Files that it may have open.", (), {(): float(open_files.split()[3])}
    )
    yield gauge("process_start_time_seconds", "When it started, in Unix time.", (), {(): _start()})


def _start() -> float:
    """When this process started, in Unix time in seconds."""
    after_name = (_PROC / "self/stat").read_text().rpartition(")")[2].split()
    ticks = int(after_name[_START_FIELD])
    boot = next(
        int(line.split()[1])
        for line in (_PROC / "stat").read_text().splitlines()
        if line.startswith("btime ")
    )
    return boot + ticks / os.sysconf("SC_CLK_TCK")
