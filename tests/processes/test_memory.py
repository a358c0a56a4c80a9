"""The memory that a process may use, which its control group may limit."""

import os
from pathlib import Path

import pytest

from asyncinfer.processes.memory import group_limit_bytes, usable_bytes

MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
LIMIT = 300 << 20
"""Less than any machine has that runs these tests."""

NO_LIMIT_V1 = "9223372036854771712"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"},
        {"proc/self/cgroup": "0::/pod", "sys/fs/cgroup/pod/memory.max": str(1 << 50)},
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1},
    ],
)
def test_without_a_lower_limit_it_is_that_of_the_machine(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, files)

    assert usable_bytes(tmp_path) == MACHINE


@pytest.mark.parametrize(
    "files",
    [
        {"sys/fs/cgroup/memory.max": str(LIMIT)},
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(LIMIT)},
        {
            "proc/self/cgroup": "3:cpu:/old\n0::/pod/box",
            "sys/fs/cgroup/memory.max": str(LIMIT + 1),
            "sys/fs/cgroup/pod/memory.max": str(LIMIT),
            "sys/fs/cgroup/pod/box/memory.max": "max",
        },
        {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(LIMIT)},
        {
            "proc/self/cgroup": "4:memory:/pod/box\n1:cpu,cpuacct:/other\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "sys/fs/cgroup/memory/pod/memory.limit_in_bytes": str(LIMIT),
            "sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": NO_LIMIT_V1,
        },
        {
            "proc/self/cgroup": "4:memory:/outside/of/this/container",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(LIMIT),
        },
    ],
)
def test_the_least_limit_of_the_control_groups_of_either_version_counts(
    tmp_path: Path, files: dict[str, str]
) -> None:
    write(tmp_path, files)

    assert group_limit_bytes(tmp_path) == usable_bytes(tmp_path) == LIMIT
