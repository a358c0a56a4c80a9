"""Tells when the model folder may have changed (the only door to watchfiles)."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_STEP_MS: Final = 100
_TIMER_SECONDS: Final = 1.0
"""How often the folder is read while the system cannot tell of its changes."""

_RETRY_SECONDS: Final = 30.0
"""After so long of that, the system is asked again."""

_HELD_SECONDS: Final = 60.0
"""A watch that failed sooner is part of the same outage, which is logged once."""


async def changes(
    folder: Path, *, rescan_seconds: float, stopping: asyncio.Event
) -> AsyncIterator[None]:
    """One for each change that the system tells of, and one each `rescan_seconds`, since a network
    file system tells of none. Ends soon after `stopping` is set; must not be cancelled before.

    It never raises: where the folder cannot be watched, one comes each second.
    """
    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    is_out = False
    while not stopping.is_set():
        started_at = time.monotonic()
        try:
            async with aclosing(_while_there(folder, rescan_seconds, stopping)) as watched:
                async for _ in watched:
                    yield
        # Whatever a watcher raises (OSError, its own RuntimeError, either in an ExceptionGroup)
        # must not end the worker, which serves without it.
        except Exception as error:
            if not is_out or time.monotonic() - started_at > _HELD_SECONDS:
                log.warning(
                    "%s cannot be watched: %s. It is read every second instead.",
                    *(folder, _reason(error)),
                )
            is_out = True
        else:
            if _identity(folder) is not None:
                yield
                continue
        async for _ in _timer(folder, stopping):
            yield


async def _while_there(
    folder: Path, rescan_seconds: float, stopping: asyncio.Event
) -> AsyncGenerator[None, None]:
    """Ends when the path means another folder, or none: a watch stays with the old one."""
    identity = _identity(folder)
    if identity is None:
        return
    for passing_over in (False, True):
        # A watch of a tree ends at the first folder that may not be read, such as the lost+found
        # of a volume, and leaves those behind it unwatched. So each is then watched for itself.
        paths = [folder, *_readable_folders(folder)] if passing_over else [folder]
        watch = _watch(paths, rescan_seconds, stopping, passing_over=passing_over)
        try:
            async with aclosing(watch) as told:
                async for _ in told:
                    yield
                    if _identity(folder) != identity:
                        return
            return
        except PermissionError:
            if passing_over:
                raise


async def _watch(
    paths: list[Path],
    rescan_seconds: float,
    stopping: asyncio.Event,
    *,
    passing_over: bool = False,
) -> AsyncGenerator[object, None]:
    # Imported late: 20 ms that a worker's start need not wait for.
    from watchfiles import awatch

    told = awatch(
        *paths,
        watch_filter=None,
        debounce=5 * _STEP_MS,
        step=_STEP_MS,
        stop_event=stopping,
        rust_timeout=int(rescan_seconds * 1000),
        yield_on_timeout=True,
        ignore_permission_denied=passing_over,
    )
    async for one in told:
        yield one


async def _timer(folder: Path, stopping: asyncio.Event) -> AsyncIterator[None]:
    """One each second, until it is time to try another watch."""
    identity = _identity(folder)
    ends_at = time.monotonic() + _RETRY_SECONDS
    while not stopping.is_set() and time.monotonic() < ends_at:
        yield
        if _identity(folder) != identity:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TIMER_SECONDS):
                await stopping.wait()


def _identity(folder: Path) -> tuple[int, int] | None:
    """None where it is not there."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _readable_folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(one) for one in entries if one.is_dir() and os.access(one, os.R_OK)]
    except OSError:
        return []


def _reason(error: BaseException) -> str:
    """Of a group, the first that it holds: the group itself says nothing."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
