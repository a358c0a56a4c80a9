"""The page of the metrics."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import anyio

from asyncinfer.monitoring.port import Answer

_FRESH_SECONDS: Final = 0.5
"""Requests within this time get the same text, so that many of them cost as much as a few."""

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

WriteText = Callable[[], bytes]
"""Writes the metrics, which takes some milliseconds; runs in a thread."""


class MetricsPage:
    """Answers with the metrics; one object for each port."""

    def __init__(self, read: Callable[[], Awaitable[WriteText]]) -> None:
        """`read` reads the present figures in the event loop, and returns what writes them."""
        self._read = read
        self._lock = anyio.Lock()
        self._answer = Answer(200, b"")
        self._made_at = float("-inf")

    async def __call__(self) -> Answer:
        """The metrics in the text format of Prometheus, at most half a second old. Raises what
        `read` raises."""
        async with self._lock:
            if time.monotonic() - self._made_at > _FRESH_SECONDS:
                write = await self._read()
                self._answer = Answer(200, await asyncio.to_thread(write), MEDIA_TYPE)
                self._made_at = time.monotonic()
            return self._answer
