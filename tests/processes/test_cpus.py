"""The number of cores that a process may use, which may be fewer than the machine has."""

from pathlib import Path

import pytest

from asyncinfer.processes import cpus as module
from asyncinfer.processes.cpus import usable_cores


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_there_is_at_least_one_core() -> None:
    assert usable_cores() >= 1


def test_without_a_quota_the_affinity_gives_the_number_of_cores(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")

    assert usable_cores(tmp_path) == module._affinity()


@pytest.mark.parametrize("folder", ["", "pod/", "pod/box/"])
def test_a_quota_on_the_process_or_a_group_above_it_limits_the_cores(
    tmp_path: Path, folder: str
) -> None:
    write(tmp_path, "proc/self/cgroup", "3:cpu:/old\n0::/pod/box\n")
    write(tmp_path, f"sys/fs/cgroup/{folder}cpu.max", "50000 100000\n")

    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize("folder", ["", "pod/", "pod/box/"])
def test_a_quota_of_cgroup_version_1_limits_the_cores(tmp_path: Path, folder: str) -> None:
    write(tmp_path, "proc/self/cgroup", "3:cpu,cpuacct:/pod/box\n0::/\n")
    write(tmp_path, f"sys/fs/cgroup/cpu/{folder}cpu.cfs_quota_us", "100000\n")
    write(tmp_path, f"sys/fs/cgroup/cpu/{folder}cpu.cfs_period_us", "100000\n")

    assert usable_cores(tmp_path) == 1
