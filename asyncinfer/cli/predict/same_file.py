"""Refuses an output that is the input, before either is opened."""

import contextlib
import io
import os
import stat
import sys
from typing import IO

from asyncinfer.errors import FileRefused


def check_output(source: str, output: str | None) -> None:
    """Raises FileRefused if stdin is closed, or results would go over the rows or to a folder.

    `source` is a path, or - for stdin; `output` is a path, or None for stdout. A file is the same
    by any of its paths, and if a shell opened it. While results come they are in `output`.part.
    """
    if output is not None and os.path.isdir(output):
        raise FileRefused(f"{output} is a folder. Give --output the path of a file.")
    if source == "-" and sys.stdin is None:
        raise FileRefused("stdin is closed. Give the path of a file, or one row as an argument.")
    rows = _status_of_stream(sys.stdin) if source == "-" else _status_of_path(source)
    if rows is None or not stat.S_ISREG(rows.st_mode):
        return
    results = (
        (_status_of_stream(sys.stdout),)
        if output is None
        else (_status_of_path(output), _status_of_path(f"{output}.part"))
    )
    if any(result is not None and os.path.samestat(rows, result) for result in results):
        raise FileRefused(
            f"{output or 'stdout'} is the file of the rows, which the results would destroy. Give "
            "--output another file."
        )


def _status_of_path(path: str) -> os.stat_result | None:
    """The status of a file; None if there is none."""
    with contextlib.suppress(OSError):
        return os.stat(path)
    return None


def _status_of_stream(stream: IO[str]) -> os.stat_result | None:
    """The status of the file that a stream is open on; None for a stream in memory."""
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        return os.fstat(stream.fileno())
    return None
