"""The cores that we may use, not those that there are."""

from pathlib import Path

import pytest

from asyncinfer.processes import cpus as module
from asyncinfer.processes.cpus import cores


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_there_is_at_least_one() -> None:
    assert cores() >= 1


def test_without_a_quota_they_are_those_of_our_affinity(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000\n")

    assert cores(tmp_path) == module._affinity()


@pytest.mark.parametrize("folder", ["", "pod/", "pod/box/"])
def test_a_quota_on_us_or_above_us_limits_them(tmp_path: Path, folder: str) -> None:
    write(tmp_path, "proc/self/cgroup", "3:cpu:/old\n0::/pod/box\n")
    write(tmp_path, f"sys/fs/cgroup/{folder}cpu.max", "50000 100000\n")

    assert cores(tmp_path) == 1


def test_a_quota_of_the_first_version_limits_them(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")

    assert cores(tmp_path) == 1
