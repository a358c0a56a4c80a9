"""The memory that this process may use, by its machine and by its control group."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from asyncinfer.processes import control_groups

_ROOT: Final = Path("/")
_NO_LIMIT_BYTES: Final = 1 << 60
"""Version 1 of control groups writes about 2^63 for no limit."""


def usable_bytes(root: Path = _ROOT) -> int:
    """The memory of this machine, or what the control group allows if that is less.

    `root` is the folder in which `proc` and `sys` are mounted.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(machine, group_limit_bytes(root) or machine)


def resident_bytes() -> int | None:
    """The memory of this process that is in RAM; None where the system does not say."""
    try:
        pages = int((_ROOT / "proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def group_limit_bytes(root: Path = _ROOT) -> int | None:
    """The memory that the control group of this process and those above it allow, version 2 or 1;
    None without a limit. `root` is as in `usable_bytes`."""
    return min(_limits(root), default=None)


def _limits(root: Path) -> Iterator[int]:
    files = (
        *(folder / "memory.max" for folder in control_groups.v2_folders(root)),
        *(folder / "memory.limit_in_bytes" for folder in control_groups.v1_folders(root, "memory")),
    )
    for file in files:
        for line in control_groups.lines(file):
            if line.isdigit() and int(line) < _NO_LIMIT_BYTES:
                yield int(line)
