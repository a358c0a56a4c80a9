"""Queues whose jobs wait for others to run with: since when, and whether it was long enough."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.claims import Runs
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.store import Store

log = LimitedLog(logging.getLogger(__name__))

_FAREWELL_SECONDS: Final = 1.0


class Sharing(Struct, frozen=True):
    """How the jobs of a queue's model share runs."""

    shared: bool = True
    wait_seconds: float = 0.0
    """How long a job may wait for others; 0: it is claimed at once."""
    full_jobs: int = 1
    """So many jobs make a batch that waits no longer."""


class Gathering:
    """Hears of jobs in `queues`, and makes each of these ripe when its jobs may be claimed.

    Bells are heard only while a slot is idle: one that nobody here can answer is for others.
    """

    def __init__(
        self, store: Store, runs: Runs, is_idle: Callable[[], bool], look_seconds: float
    ) -> None:
        self.queues: dict[str, Sharing] = {}
        self.ripe: set[str] = set()
        self.ripened = asyncio.Event()
        """Set while any is ripe."""
        self._store = store
        self._runs = runs
        self._is_idle = is_idle
        self._look_seconds = look_seconds
        self._looked_at = 0.0
        self._heard = 0
        self._doorbell = Doorbell(store)
        self._full: dict[str, asyncio.Event] = {}
        """Of the queues that wait; set when they need not wait longer."""
        self._news = asyncio.Event()
        self._closed = False

    def serve(self, queues: Mapping[str, Sharing]) -> None:
        self.queues = {
            queue: sharing
            for queue, sharing in queues.items()
            if sharing.shared and sharing.wait_seconds > 0 and sharing.full_jobs > 1
        }
        self.claimed(self.ripe - self.queues.keys())
        self._news.set()

    def waits(self, queue: str) -> bool:
        """Whether nothing is to be claimed of it yet."""
        return queue in self.queues and queue not in self.ripe

    def claimed(self, queues: Iterable[str]) -> None:
        """What waits in these from now on waits anew."""
        self.ripe.difference_update(queues)
        if not self.ripe:
            self.ripened.clear()

    def slot_is_idle(self) -> None:
        if self.queues:
            self._news.set()

    async def listen(self) -> None:
        """Runs as long as the worker does; ends when closed."""
        async with anyio.create_task_group() as group:
            while not self._closed:
                try:
                    await self._hear(group)
                except RedisUnavailable as error:
                    if not self._closed:
                        log.warning(f"Gathering: {error.detail}")
                        await asyncio.sleep(random.uniform(0.1, 0.5))

    async def close(self) -> None:
        """Nothing is ripe any more; what waits is left to others, who hear of it."""
        self._closed = True
        self._news.set()
        await self._doorbell.close()
        left = self.ripe | self._full.keys()
        for full in self._full.values():
            full.set()
        self.claimed(left)
        with contextlib.suppress(RedisUnavailable, TimeoutError):
            async with asyncio.timeout(_FAREWELL_SECONDS):
                for queue in left:
                    await self._doorbell.ring(queue)

    async def _hear(self, group: TaskGroup) -> None:
        rang = await self._rang()
        seen = [rang] if rang else []
        if time.monotonic() - self._looked_at >= self._look_seconds:
            seen = await self._look()
        for queue in seen:
            if self.waits(queue) and (count := await self._waiting(queue)) and self.waits(queue):
                if queue not in self._full:
                    self._full[queue] = asyncio.Event()
                    group.start_soon(self._gather, queue, self.queues[queue].wait_seconds)
                if count >= self.queues[queue].full_jobs:
                    self._full[queue].set()

    async def _gather(self, queue: str, wait_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                await self._full[queue].wait()
        del self._full[queue]
        if queue in self.queues and not self._closed:
            self.ripe.add(queue)
            self.ripened.set()

    async def _rang(self) -> str | None:
        """The queue whose bell rang, heard for an idle slot; None when it is time to look."""
        if not self._is_idle() or not self.queues:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._look_seconds if self.queues else None):
                    await self._news.wait()
            return None
        rang = await self._doorbell.wait(self._turn(), self._look_seconds)
        if rang and not self._is_idle():
            await self._doorbell.ring(rang)
            return None
        return rang

    def _turn(self) -> list[str]:
        """Another first each time: BRPOP serves the first that has a token."""
        self._heard += 1
        names = list(self.queues)
        at = self._heard % len(names)
        return names[at:] + names[:at]

    async def _look(self) -> list[str]:
        self._looked_at = time.monotonic()
        names = list(self.queues)
        return names if names and await self._runs.has_work(names) else []

    async def _waiting(self, queue: str) -> int:
        try:
            return sum([await self._store.command("LLEN", name) for name in keys.waiting(queue)])
        except RedisRefused:
            # A damaged key: the claim will tell.
            return 1
