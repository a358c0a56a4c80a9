"""The background roles: sweep, repair, announce, and renew from a thread."""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final

from asyncinfer.errors import RedisRefused, RedisUnavailable, RequestError, StorageFull
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import Claim, Renewal, Renewals
from asyncinfer.repository.maintenance import Swept, Upkeep
from asyncinfer.repository.store import Store

log = logging.getLogger(__name__)
_limited = LimitedLog(log)

REPAIR_SECONDS: Final = 600.0
ANNOUNCE_SECONDS: Final = 3.0


async def reap_forever(store: Store) -> None:
    """Sweeps about every tick; any number of processes make one sweep. Ends by cancellation."""
    upkeep = Upkeep(store)
    tick_seconds = store.policy.tick_ms / 1000
    repaired_at = time.monotonic()
    away = False
    while True:
        await asyncio.sleep(tick_seconds * random.uniform(0.5, 1.5))
        try:
            _report(await upkeep.sweep())
            if time.monotonic() - repaired_at > REPAIR_SECONDS:
                repaired_at = time.monotonic()
                if back := await upkeep.repair(REPAIR_SECONDS):
                    log.warning("Repair put back %d jobs found out of place.", back)
            away = False
        except RedisUnavailable as error:
            if not away:
                log.warning("Sweep: %s", error.detail)
            away = True
        except Exception as error:
            # Redis holds what anyone may write; no content may end the role that all rely on.
            _limited.unexpected("A sweep failed.", error)


def _report(swept: Swept) -> None:
    if swept.put_back or swept.dead:
        log.warning("Lost workers: %d jobs put back, %d dead letters.", swept.put_back, swept.dead)


async def announce_forever(
    announce: Callable[[], Awaitable[None]],
    news: asyncio.Event,
    on_answered: Callable[[], None],
) -> None:
    """Calls `announce` every few seconds, and at once when there is news. Ends by cancellation."""
    while True:
        news.clear()
        try:
            await announce()
            on_answered()
        except StorageFull:
            # What runs still finishes, so the worker is as ready as it was.
            on_answered()
        except RedisRefused as error:
            _limited.warning(f"Announce: {error.detail}")
        except RequestError as error:
            log.debug("Announce: %s", error.detail)
        except Exception as error:
            _limited.unexpected("An announcement failed.", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANNOUNCE_SECONDS * random.uniform(0.8, 1.2)):
                await news.wait()


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
                _limited.unexpected("A renewal failed.", error)
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
