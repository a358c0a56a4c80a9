"""The folders of the control groups that this process is in, where their limits are files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_MOUNTED: Final = "sys/fs/cgroup"


def v2_folders(root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it, in version 2: each may set a
    limit. `root` is the folder in which `proc` and `sys` are mounted."""
    yield from _with_parents(root / _MOUNTED, _path_of(root, ""))


def v1_folders(root: Path, controller: str) -> Iterator[Path]:
    """The same in version 1, for one controller, such as `memory`. A container sees its own group
    at the mount point, whatever the path of the group is outside."""
    yield from _with_parents(root / _MOUNTED / controller, _path_of(root, controller))


def lines(path: Path) -> list[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _path_of(root: Path, controller: str) -> str:
    """The path of this process's group for a controller, for an empty name that in version 2; empty
    for the group at the mount point."""
    for line in lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            return path.lstrip("/")
    return ""


def _with_parents(mounted: Path, path: str) -> Iterator[Path]:
    """The folder of the group at `path`, and those above it up to where they are mounted."""
    folder = mounted / path
    yield from (folder, *folder.parents[: len(folder.relative_to(mounted).parts)])
