"""Watching the model folder for changes (the only door to watchfiles)."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

from asyncinfer.timeouts import set_within

_log = logging.getLogger(__name__)

_STEP_MS: Final = 100
_TIMER_SECONDS: Final = 1.0
"""How often the folder is read while the system cannot watch it."""

_RETRY_SECONDS: Final = 30.0
"""How long the folder is read like this until a watch is tried again."""

_STABLE_SECONDS: Final = 60.0
"""A watch that fails sooner than this is part of the same outage, which is logged once."""


async def folder_changes(
    folder: Path, *, rescan_seconds: float, stopping: asyncio.Event
) -> AsyncIterator[None]:
    """Yields whenever the folder may have changed: at each change that the system reports, and
    every `rescan_seconds`, since a network file system reports none.

    Never raises: while the folder cannot be watched, it yields every second, which is logged once.
    Ends soon after `stopping` is set; must not be cancelled before.
    """
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    is_failing = False
    while not stopping.is_set():
        started_at = time.monotonic()
        try:
            async with aclosing(_until_replaced(folder, rescan_seconds, stopping)) as watched:
                async for _ in watched:
                    yield
        # Whatever a watcher raises (OSError, its own RuntimeError, either in an ExceptionGroup)
        # must not end the worker, which serves without it.
        except Exception as error:
            if not is_failing or time.monotonic() - started_at > _STABLE_SECONDS:
                _log.warning(
                    "%s cannot be watched: %s. It is read every second instead.",
                    *(folder, _error_text(error)),
                )
            is_failing = True
        else:
            if _identity(folder) is not None:
                yield
                continue
        async for _ in _poll(folder, stopping):
            yield


async def _until_replaced(
    folder: Path, rescan_seconds: float, stopping: asyncio.Event
) -> AsyncGenerator[None, None]:
    """Yields at each change until the path is another folder or none: a watch would stay with the
    old folder. Ends at once if there is no folder. Raises what a watcher raises."""
    identity = _identity(folder)
    if identity is None:
        return
    for skip_unreadable in (False, True):
        # A watch of a tree ends at the first folder that may not be read, such as the lost+found
        # of a volume, and leaves those behind it unwatched. So each is then watched for itself.
        paths = [folder, *_readable_folders(folder)] if skip_unreadable else [folder]
        watch = _watch(paths, rescan_seconds, stopping, skip_unreadable=skip_unreadable)
        try:
            async with aclosing(watch) as events:
                async for _ in events:
                    yield
                    if _identity(folder) != identity:
                        return
            return
        except PermissionError:
            if skip_unreadable:
                raise


async def _watch(
    paths: list[Path],
    rescan_seconds: float,
    stopping: asyncio.Event,
    *,
    skip_unreadable: bool = False,
) -> AsyncGenerator[object, None]:
    """Yields at each change in these folders and those within, and every `rescan_seconds`; what it
    yields has no meaning. Ends when `stopping` is set; raises what watchfiles raises."""
    # Imported late, since it takes 20 ms that the start of a worker need not wait for.
    from watchfiles import awatch

    events = awatch(
        *paths,
        watch_filter=None,
        debounce=5 * _STEP_MS,
        step=_STEP_MS,
        stop_event=stopping,
        rust_timeout=int(rescan_seconds * 1000),
        yield_on_timeout=True,
        ignore_permission_denied=skip_unreadable,
    )
    async for event in events:
        yield event


async def _poll(folder: Path, stopping: asyncio.Event) -> AsyncIterator[None]:
    """Yields at once and then every second, until it is time to try a watch again, the path is
    another folder, or `stopping` is set."""
    identity = _identity(folder)
    ends_at = time.monotonic() + _RETRY_SECONDS
    while not stopping.is_set() and time.monotonic() < ends_at:
        yield
        if _identity(folder) != identity:
            return
        await set_within(stopping, _TIMER_SECONDS)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode, which tell two folders of one name apart; None if there is no folder."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _readable_folders(folder: Path) -> list[Path]:
    """The folders directly in this one that may be read; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [
                Path(entry) for entry in entries if entry.is_dir() and os.access(entry, os.R_OK)
            ]
    except OSError:
        return []


def _error_text(error: BaseException) -> str:
    """Type and message; of an exception group those of the first exception in it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
