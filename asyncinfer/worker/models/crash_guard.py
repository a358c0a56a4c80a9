"""A guard against files that crash the process that loads them.

A mark on disk names the file that is being loaded. A later process that finds the mark of a dead
process first tries that file in a child. All other files are loaded directly, since a child for
each would slow every start.
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
from asyncinfer.worker.models.sandbox import try_in_child

Load = Callable[[ModelFile], Engine]


class CrashGuard:
    """Loads files, and first tries in a child each file during whose load a process has died. Call
    it in one thread, outside an event loop."""

    def __init__(self, load: Load, *, allow_custom_ops: bool, folder: Path | None = None) -> None:
        """Marks are kept in `folder`; None: in a folder of this user for temporary files."""
        self._load = load
        self._allow_custom_ops = allow_custom_ops
        self._folder = _marks_folder(folder)
        self._mark: Path | None = None
        self._is_exiting = False

    def __call__(self, file: ModelFile) -> Engine:
        """Loads the file and returns its engine; blocks, for up to a minute longer if it is tried
        in a child first. Raises ModelRefused."""
        if self._folder is None:
            return self._load(file)
        stamp = read_stamp(file)
        mark = self._folder / hashlib.sha256(repr((file.path, stamp)).encode()).hexdigest()
        if _was_left_by_crash(mark):
            size_bytes = total_bytes(stamp)
            problem = asyncio.run(
                try_in_child(file, size_bytes, allow_custom_ops=self._allow_custom_ops)
            )
            if problem:
                raise ModelRefused(problem)
        self._mark = mark
        if self._is_exiting:
            return self._load(file)
        with _marked(mark):
            return self._load(file)

    def prepare_exit(self) -> None:
        """Removes the mark, since this process is about to end on purpose: the file that it is
        loading is not to blame. Later loads are not marked any more."""
        self._is_exiting = True
        if self._mark:
            with contextlib.suppress(OSError):
                self._mark.unlink()


def _marks_folder(folder: Path | None) -> Path | None:
    """The folder for marks, created if need be; None where there can be none."""
    if sys.platform == "win32":
        return None
    try:
        marks = folder or Path(tempfile.gettempdir()) / f"asyncinfer-loading-{os.getuid()}"
    except FileNotFoundError:
        return None  # a container with a read-only root, and nothing writable in it
    return marks if _is_own_folder(marks) else None


def _is_own_folder(folder: Path) -> bool:
    """Creates the folder, and returns whether it is a folder of this user: another user of the
    machine could have put a link there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


@contextmanager
def _marked(mark: Path) -> Iterator[None]:
    """Writes this process's number into the mark, and removes the mark at the end, also after an
    exception: it stays only if the process dies meanwhile."""
    # A mark that cannot be written must not keep the file from being loaded.
    with contextlib.suppress(OSError):
        mark.write_text(str(os.getpid()))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()


def _was_left_by_crash(mark: Path) -> bool:
    """Whether the mark exists and its process is dead; also for a mark that cannot be read as a
    number. False if the process is alive, also as another user's."""
    try:
        pid = int(mark.read_text())
        # In a container the restarted process has the number of the one that died.
        if pid != os.getpid():
            os.kill(pid, 0)
            return False
    except (FileNotFoundError, PermissionError):
        return False
    except (OSError, ValueError):
        return True
    return True
