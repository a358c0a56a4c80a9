"""Tells when the model folder may have changed (the only door to watchfiles)."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_STEP_MS: Final = 100
_AGAIN_SECONDS: Final = 1.0


async def changes(
    folder: Path, *, rescan_seconds: float, stopping: asyncio.Event
) -> AsyncIterator[None]:
    """One for each change that the system tells of, and one each `rescan_seconds`, since a network
    file system tells of none. Ends soon after `stopping` is set; must not be cancelled before."""
    # Imported late: 20 ms that a worker's start need not wait for.
    from watchfiles import awatch

    logging.getLogger("watchfiles").setLevel(logging.WARNING)
    poll: bool | None = None
    while not stopping.is_set():
        try:
            async for _ in awatch(
                folder,
                watch_filter=None,
                debounce=5 * _STEP_MS,
                step=_STEP_MS,
                stop_event=stopping,
                rust_timeout=int(rescan_seconds * 1000),
                yield_on_timeout=True,
                force_polling=poll,
            ):
                yield
        except (OSError, RuntimeError) as error:
            # No inotify (its watches are used up, say), or the folder is gone for a moment.
            log.warning("Watching %s: %s. It is read every second instead.", folder, error)
            poll = True
            yield
            await asyncio.sleep(_AGAIN_SECONDS)
