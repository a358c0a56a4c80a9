"""The number of CPU cores this process may use, by affinity and by its control group."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """How many cores this process may use, at least 1; a fraction counts as a whole core.

    `root` is the folder in which `proc` and `sys` are mounted.
    """
    quotas = (_v1_quota(root), *(_v2_quota(folder) for folder in _v2_folders(root)))
    return max(1, math.ceil(min([_affinity(), *(quota for quota in quotas if quota)])))


def _affinity() -> int:
    """The number of cores that this process may run on; all cores on systems that do not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _v2_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of those above it: each may set a quota."""
    mounted = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        if line.startswith("0::/"):
            folder = mounted / line.removeprefix("0::/")
            yield from (folder, *folder.parents[: len(folder.relative_to(mounted).parts)])


def _v2_quota(folder: Path) -> float | None:
    """How many cores one control group may use, perhaps a fraction; None if it has no quota."""
    for line in _lines(folder / "cpu.max"):
        quota, _, period = line.partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    return None


def _v1_quota(root: Path) -> float | None:
    """How many cores version 1 of control groups allows at its mount point, perhaps a fraction;
    None if there is no quota."""
    folder = root / "sys/fs/cgroup/cpu"
    numbers = [
        int(line)
        for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        for line in _lines(folder / name)
    ]
    return numbers[0] / numbers[1] if len(numbers) == 2 and numbers[0] > 0 else None


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
