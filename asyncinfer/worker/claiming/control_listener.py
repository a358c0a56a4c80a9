"""Hears at once what is asked of running jobs: cancel, expire."""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable
from typing import Final

from asyncinfer.errors import RedisUnavailable
from asyncinfer.jobs import id_text
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.store import Store
from asyncinfer.untrusted import decoding

log = LimitedLog(logging.getLogger(__name__))

_READ_SECONDS: Final = 5.0
_GROWING_SECONDS: Final = 0.1
"""How long a read takes while queues come that it does not listen to."""


class Control:
    """Reads the control streams of this worker's queues."""

    def __init__(
        self, store: Store, queues: Iterable[str], heard: Callable[[str, str], None]
    ) -> None:
        self._store = store
        self.serve(queues)
        self._heard = heard
        self._blocking = store.blocking()
        self._last: dict[str, bytes] = {}

    def serve(self, queues: Iterable[str], *, is_growing: bool = False) -> None:
        """From the next read on listens to these, and always to the default model's queue; with
        `is_growing`, as more are about to come, the next read comes soon."""
        self._is_growing = is_growing
        self._streams = [keys.control(queue) for queue in {self._store.n, *queues}]

    async def listen(self) -> None:
        """Tells `heard(what, job_id)`; ends when closed. What it misses a renewal tells later."""
        while not self._blocking.closed:
            try:
                await self._start_at_the_end()
                await self._read()
            except RedisUnavailable as error:
                if not self._blocking.closed:
                    log.warning(f"Control: {error.detail}")
                    await asyncio.sleep(random.uniform(0.1, 0.5))

    async def close(self) -> None:
        await self._blocking.close()

    async def _start_at_the_end(self) -> None:
        for stream in self._streams:
            if stream not in self._last:
                newest = await self._store.look(
                    *("XREVRANGE", stream, "+", "-", "COUNT", 1), otherwise=()
                )
                self._last[stream] = bytes(newest[0][0]) if newest else b"0"

    async def _read(self) -> None:
        seconds = _GROWING_SECONDS if self._is_growing else _READ_SECONDS
        # Some may have come since the last start.
        asked = {name: self._last[name] for name in self._streams if name in self._last}
        for stream, entry_id, fields in await self._blocking.read(asked, seconds):
            self._last[stream] = entry_id
            for what, job_id in fields.items():
                self._heard(decoding.text(what), id_text(job_id))
