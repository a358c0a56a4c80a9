"""Queues whose jobs wait up to `max_wait_ms` for others to share a run with."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import anyio
from anyio.abc import TaskGroup
from msgspec import Struct

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.claims import QueueConsumer
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import pause_before_retry, set_within

_log = LimitedLog(logging.getLogger(__name__))

_LAST_CALLS_SECONDS: Final = 1.0


class QueueBatching(Struct, frozen=True):
    """How the jobs of a queue's model share runs."""

    is_batched: bool = True
    """Whether jobs share runs at all."""
    max_wait_seconds: float = 0.0
    """How long a job may wait for others; 0: it is claimed at once."""
    full_jobs: int = 1
    """This many waiting jobs fill a batch, so that they wait no longer."""


class BatchWindows:
    """Opens a window when jobs come to one of `queues`, and lets the queue be claimed at its end.
    There is one instance per worker; the claimer leaves out the queues that `must_wait`.

    A window ends after `max_wait_seconds`, or as soon as enough jobs for a full batch wait.

    Waits on the doorbell only while a slot is idle, so that it does not consume a token that
    another worker needs.
    """

    def __init__(
        self,
        store: Store,
        consumer: QueueConsumer,
        is_idle: Callable[[], bool],
        check_seconds: float,
    ) -> None:
        """`is_idle` tells whether a slot waits for jobs; `check_seconds` is the longest time
        between two checks of the queues themselves, in case a doorbell token was lost."""
        self.queues: dict[str, QueueBatching] = {}
        """Only those whose jobs wait for others."""
        self.due: set[str] = set()
        """Queues whose window has ended, so that their jobs may be claimed."""
        self.any_due = asyncio.Event()
        """Set while `due` is not empty."""
        self._store = store
        self._consumer = consumer
        self._is_idle = is_idle
        self._check_seconds = check_seconds
        self._checked_at = 0.0
        self._waits_begun = 0
        self._doorbell = Doorbell(store)
        self._open: dict[str, asyncio.Event] = {}
        """By queue with an open window, the event that ends it early."""
        self._wake_event = asyncio.Event()
        self._is_closed = False

    def serve(self, queues: Mapping[str, QueueBatching]) -> None:
        """Replaces the queues and wakes `listen`. Keeps only those whose jobs wait for others: they
        share runs, `max_wait_seconds` is positive and `full_jobs` above 1. A queue that is left out
        is no longer due, and a window that is open for it has no effect when it ends."""
        self.queues = {
            queue: batching
            for queue, batching in queues.items()
            if batching.is_batched and batching.max_wait_seconds > 0 and batching.full_jobs > 1
        }
        self.clear_due(self.due - self.queues.keys())
        self._wake_event.set()

    def must_wait(self, queue: str) -> bool:
        """Whether a claim must leave out this queue, since its jobs wait for others. Also true
        while no window is open, as before the first job; false once a window has ended, until
        `clear_due`. False for a queue that is not in `queues`."""
        return queue in self.queues and queue not in self.due

    def clear_due(self, queues: Iterable[str]) -> None:
        """Call after these queues were claimed or found empty: they are no longer due, so that
        later jobs wait in a new window. Queues that are not due are ignored."""
        self.due.difference_update(queues)
        if not self.due:
            self.any_due.clear()

    def notify_idle_slot(self) -> None:
        """Wakes `listen`, since a slot can take jobs now. Does nothing if there are no `queues`."""
        if self.queues:
            self._wake_event.set()

    async def listen(self) -> None:
        """Opens windows until `close` is called. Retries while Redis is away, and logs that."""
        async with anyio.create_task_group() as group:
            while not self._is_closed:
                try:
                    await self._open_windows(group)
                except RedisUnavailable as error:
                    if not self._is_closed:
                        log_refused(_log, "Waiting for jobs to batch", error)
                        await pause_before_retry()

    async def close(self) -> None:
        """Ends all windows and `listen`, and makes no queue due. Rings the doorbell of each queue
        that was due or had a window, so that other workers take the jobs; gives that up after a
        second or if Redis is away."""
        self._is_closed = True
        self._wake_event.set()
        await self._doorbell.close()
        unclaimed = self.due | self._open.keys()
        for end_early in self._open.values():
            end_early.set()
        self.clear_due(unclaimed)
        with contextlib.suppress(RedisUnavailable, TimeoutError):
            async with asyncio.timeout(_LAST_CALLS_SECONDS):
                for queue in unclaimed:
                    await self._doorbell.ring(queue)

    async def _open_windows(self, group: TaskGroup) -> None:
        """Waits once for a doorbell token or the next check. Then starts in `group` a window for
        each queue that has jobs, and ends the windows of queues with enough jobs for a full batch.
        Raises RedisUnavailable."""
        rang = await self._wait_for_doorbell()
        candidates = [rang] if rang else []
        if time.monotonic() - self._checked_at >= self._check_seconds:
            candidates = await self._queues_with_work()
        for queue in candidates:
            if (
                self.must_wait(queue)
                and (count := await self._count_waiting(queue))
                and self.must_wait(queue)
                and not self._is_closed
            ):
                if queue not in self._open:
                    self._open[queue] = asyncio.Event()
                    group.start_soon(self._run_window, queue, self.queues[queue].max_wait_seconds)
                if count >= self.queues[queue].full_jobs:
                    self._open[queue].set()

    async def _run_window(self, queue: str, wait_seconds: float) -> None:
        """Waits until the window was ended early or `wait_seconds` are over, then makes the queue
        due; not if the windows are closed or its jobs no longer wait for others."""
        await set_within(self._open[queue], wait_seconds)
        del self._open[queue]
        if queue in self.queues and not self._is_closed:
            self.due.add(queue)
            self.any_due.set()

    async def _wait_for_doorbell(self) -> str | None:
        """The queue whose doorbell rang while a slot is idle; None when it is time to check. If no
        slot is idle at first, it takes no token and returns None when it is woken or it is time.

        A token that came when no slot was idle any more is given back. Raises RedisUnavailable.
        """
        if not self._is_idle() or not self.queues:
            self._wake_event.clear()
            await set_within(self._wake_event, self._check_seconds if self.queues else None)
            return None
        self._waits_begun += 1
        queues = rotated(list(self.queues), self._waits_begun)
        rang = await self._doorbell.wait(queues, self._check_seconds)
        if rang and not self._is_idle():
            await self._doorbell.ring(rang)
            return None
        return rang

    async def _queues_with_work(self) -> list[str]:
        """All queues if any of them has jobs, else none; notes that they were checked now. Raises
        RedisUnavailable."""
        self._checked_at = time.monotonic()
        names = list(self.queues)
        return names if names and await self._consumer.has_work(names) else []

    async def _count_waiting(self, queue: str) -> int:
        """The length of the queue's lists, of all priorities: stale entries count, delayed jobs do
        not. 1 if Redis refuses to count them. Raises RedisUnavailable."""
        try:
            return sum([await self._store.command("LLEN", name) for name in keys.waiting(queue)])
        except RedisRefused:
            # A key is damaged. The claim that follows reports it.
            return 1


def rotated(queues: Sequence[str], start: int) -> list[str]:
    """The queues, beginning with another one for each `start`, since BRPOP and claim serve the
    first that has something."""
    start %= len(queues) or 1
    return [*queues[start:], *queues[:start]]
