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

from asyncinfer import models
from asyncinfer.engine import Engine
from asyncinfer.errors import ModelRefused
from asyncinfer.models import ModelFile
from asyncinfer.worker.trial import trial

Load = Callable[[ModelFile], Engine]


def carefully(load: Load, *, allow_custom_ops: bool, folder: Path | None = None) -> Load:
    """`load`, but what a process died of is first tried in a child; raises ModelRefused."""
    if sys.platform == "win32":
        return load
    marks = folder or Path(tempfile.gettempdir()) / f"asyncinfer-loading-{os.getuid()}"
    if not _is_ours(marks):
        return load

    def loaded(file: ModelFile) -> Engine:
        stamp = models.stamp(file)
        mark = marks / hashlib.sha256(repr((file.path, stamp)).encode()).hexdigest()
        if _died_of(mark):
            size_bytes = models.size_bytes(stamp)
            problem = asyncio.run(trial(file, size_bytes, allow_custom_ops=allow_custom_ops))
            if problem:
                raise ModelRefused(problem)
        with _marked(mark):
            return load(file)

    return loaded


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
