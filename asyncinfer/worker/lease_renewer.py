"""The thread that renews the leases of all claims, also while the event loop is busy."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable

from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import Claim
from asyncinfer.repository.leases import Leases, Renewal
from asyncinfer.repository.store import Store

_log = LimitedLog(logging.getLogger(__name__))


class LeaseRenewer:
    """Renews this process's leases from an OS thread, since an event loop may stall.

    It pauses when the loop has shown no sign of life for two leases: a dead loop runs nothing, so
    its jobs should go to other workers.
    """

    def __init__(self, store: Store, on_renewal: Callable[[Renewal], None]) -> None:
        """`on_renewal` is called in the thread, with each renewal that found a lost lease or a
        job to stop."""
        self._renewals = Leases(store)
        self._lease_seconds = store.policy.lease_seconds
        self._on_renewal = on_renewal
        self._tokens: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._is_due = threading.Event()
        """Set to renew at once, and to close."""
        self._loop_alive_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="renew", daemon=True)

    def start(self) -> None:
        """Starts the thread; call it once."""
        self._thread.start()

    def add(self, claim: Claim) -> None:
        """Renews the lease of this claim from now on, the first time within a third of the
        lease."""
        with self._lock:
            self._tokens[claim.token] = claim.queue

    def remove(self, token: str) -> None:
        """Stops renewing a claim that was finished or lost; Redis is not called. An unknown token
        is ignored."""
        with self._lock:
            self._tokens.pop(token, None)

    def renew_now(self) -> None:
        """Has all leases renewed at once, which finds jobs to stop; returns without waiting."""
        self._is_due.set()

    async def beat(self) -> None:
        """Notes from within the event loop that the loop is alive. Ends only by cancellation."""
        while True:
            self._loop_alive_at = time.monotonic()
            await asyncio.sleep(self._lease_seconds / 6)

    async def close(self) -> None:
        """Ends the thread and waits for it; a call to Redis under way has a time limit. Leases of
        claims that are still held run out."""
        self._closed = True
        self._is_due.set()
        await asyncio.to_thread(self._thread.join)
        self._renewals.close()

    def _run(self) -> None:
        """Renews three times per lease, when it is due at once, and sooner after a failure, until
        closed; not while the event loop shows no sign of life."""
        pause_seconds = self._lease_seconds / 3
        while True:
            self._is_due.wait(pause_seconds)
            if self._closed:
                return
            self._is_due.clear()
            pause_seconds = self._lease_seconds / 3
            if time.monotonic() - self._loop_alive_at > 2 * self._lease_seconds:
                continue
            try:
                self._renew()
            except RedisUnavailable:
                pause_seconds = self._lease_seconds / 10 * random.uniform(0.5, 1.5)
            except Exception as error:
                # Without this thread every long run would be given to a second worker.
                _log.unexpected("A renewal failed.", error)
                pause_seconds = self._lease_seconds / 10

    def _renew(self) -> None:
        """Renews all leases in one call, and calls `on_renewal` if that found something to do. Does
        nothing if no claim is held; raises RedisUnavailable."""
        by_queue: dict[str, list[str]] = {}
        with self._lock:
            for token, queue in self._tokens.items():
                by_queue.setdefault(queue, []).append(token)
        if by_queue:
            renewal = self._renewals.renew(by_queue)
            if renewal.lost or renewal.cancelled or renewal.expired:
                self._on_renewal(renewal)
