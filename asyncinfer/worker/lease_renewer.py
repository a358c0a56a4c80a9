"""Renews the leases of all claims from a thread, however busy the event loop is."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable

from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import Claim
from asyncinfer.repository.leases import Renewal, Renewals
from asyncinfer.repository.store import Store

_log = LimitedLog(logging.getLogger(__name__))


class Renewer:
    """Keeps this process's claims alive from an OS thread, since an event loop may stall.

    It stops when the loop shows no life for two leases: a dead loop runs nothing, so its jobs
    should go to others.
    """

    def __init__(self, store: Store, tell: Callable[[Renewal], None]) -> None:
        self._renewals = Renewals(store)
        self._lease_seconds = store.policy.lease_seconds
        self._tell = tell
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pulse = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="renew", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, claim: Claim) -> None:
        with self._lock:
            self._tokens[claim.token] = claim.queue

    def let_go(self, token: str) -> None:
        with self._lock:
            self._tokens.pop(token, None)

    def holds(self, token: str) -> bool:
        with self._lock:
            return token in self._tokens

    async def beat(self) -> None:
        """The loop's sign of life. Ends by cancellation."""
        while True:
            self._pulse = time.monotonic()
            await asyncio.sleep(self._lease_seconds / 6)

    async def close(self) -> None:
        """Ends the thread; it may be in a call, which is bounded."""
        self._ended.set()
        await asyncio.to_thread(self._thread.join)
        self._renewals.close()

    def _run(self) -> None:
        pause = self._lease_seconds / 3
        while not self._ended.wait(pause):
            pause = self._lease_seconds / 3
            if time.monotonic() - self._pulse > 2 * self._lease_seconds:
                continue
            try:
                self._renew()
            except RedisUnavailable:
                pause = self._lease_seconds / 10 * random.uniform(0.5, 1.5)
            except Exception as error:
                # Without this thread every long run would be given to a second worker.
                _log.unexpected("A renewal failed.", error)
                pause = self._lease_seconds / 10

    def _renew(self) -> None:
        by_queue: dict[str, list[str]] = {}
        with self._lock:
            for token, queue in self._tokens.items():
                by_queue.setdefault(queue, []).append(token)
        if by_queue:
            renewal = self._renewals.renew(by_queue)
            if renewal.lost or renewal.cancelled or renewal.expired:
                self._tell(renewal)
