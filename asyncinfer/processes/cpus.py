"""The number of CPU cores this process may use, by affinity and by its control group."""

import math
import os
from pathlib import Path
from typing import Final

from asyncinfer.processes import control_groups

_ROOT: Final = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """How many cores this process may use, at least 1; a fraction counts as a whole core.

    `root` is the folder in which `proc` and `sys` are mounted.
    """
    quotas = (
        *(_v1_quota(folder) for folder in control_groups.v1_folders(root, "cpu")),
        *(_v2_quota(folder) for folder in control_groups.v2_folders(root)),
    )
    return max(1, math.ceil(min([_affinity(), *(quota for quota in quotas if quota)])))


def _affinity() -> int:
    """The number of cores that this process may run on; all cores on systems that do not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _v2_quota(folder: Path) -> float | None:
    """How many cores one control group may use, perhaps a fraction; None if it has no quota."""
    for line in control_groups.lines(folder / "cpu.max"):
        quota, _, period = line.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    return None


def _v1_quota(folder: Path) -> float | None:
    """The same for one control group of version 1."""
    numbers = [
        int(line)
        for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        for line in control_groups.lines(folder / name)
    ]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[0] > 0 else None
