"""Remembers which file a process was loading when it died, so that the next tries it in a child.

A start loads files where they will run: a child for each would cost every start what only a file
that takes its process down is worth.
"""

import asyncio
import contextlib
import hashlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models.folder import ModelFile, read_stamp, total_bytes
from asyncinfer.worker.models.sandbox import trial

Load = Callable[[ModelFile], Engine]


class Careful:
    """Loads, but tries first in a child what a process died of; raises ModelRefused."""

    def __init__(self, load: Load, *, allow_custom_ops: bool, folder: Path | None = None) -> None:
        self._load = load
        self._allow_custom_ops = allow_custom_ops
        self._folder = _marks_in(folder)
        self._mark: Path | None = None
        self._leaves = False

    def __call__(self, file: ModelFile) -> Engine:
        if self._folder is None:
            return self._load(file)
        stamp = read_stamp(file)
        mark = self._folder / hashlib.sha256(repr((file.path, stamp)).encode()).hexdigest()
        if _died_of(mark):
            size_bytes = total_bytes(stamp)
            problem = asyncio.run(trial(file, size_bytes, allow_custom_ops=self._allow_custom_ops))
            if problem:
                raise ModelRefused(problem)
        self._mark = mark
        if self._leaves:
            return self._load(file)
        with _marked(mark):
            return self._load(file)

    def leave(self) -> None:
        """This process is about to end by itself, so that what it loads is not what it died of."""
        self._leaves = True
        if self._mark:
            with contextlib.suppress(OSError):
                self._mark.unlink()


def _marks_in(folder: Path | None) -> Path | None:
    if sys.platform == "win32":
        return None
    try:
        marks = folder or Path(tempfile.gettempdir()) / f"asyncinfer-loading-{os.getuid()}"
    except FileNotFoundError:
        return None  # a container with a read-only root, and nothing writable in it
    return marks if _is_ours(marks) else None


def _is_ours(folder: Path) -> bool:
    """Nothing is written where another user of the machine could have put a link."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """The mark stays only where this process does not live to take it away."""
    # Without a place for it nothing is remembered, and the load is worth more than the memory.
    with contextlib.suppress(OSError):
        mark.write_text(str(os.getpid()))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()


def _died_of(mark: Path) -> bool:
    try:
        pid = int(mark.read_text())
        # In a container the one that starts anew has the number of the one that died.
        if pid != os.getpid():
            os.kill(pid, 0)
            return False
    except (FileNotFoundError, PermissionError):
        return False
    except (OSError, ValueError):
        return True
    return True
