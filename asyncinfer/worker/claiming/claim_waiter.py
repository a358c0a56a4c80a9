"""What a free slot waits for before a claim is tried."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from asyncinfer.errors import RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import QueueConsumer
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.timeouts import pause_before_retry, set_within
from asyncinfer.worker.claiming.batch_window import BatchWindows, QueueBatching, rotated
from asyncinfer.worker.held_claim import HeldClaims, Step

_log = LimitedLog(logging.getLogger(__name__))

_SHORT_RUN_SECONDS: Final = 0.005
"""A run as short as this gains nothing from a second one beside it."""

_DEFER_SECONDS: Final = 0.005

_GROWING_SECONDS: Final = 0.1
"""How long one wait on the doorbell lasts while models are loaded: queues that come meanwhile are
not among those it waits for."""

WaitState = Literal["draining", "blocked", "ready", "deferring", "listening", "batching"]


class ClaimWaiter:
    """Waits for the slots of one process, one slot at a time, until a claim should be tried.

    state      while                               waits for              then
    blocked    there is no queue, or a job that    a release              ready
               runs alone is held or comes next
    ready      jobs may wait, or a batch window    nothing                a claim is tried; if it
               has ended                                                  gives none, listening
    deferring  as listening, and all claims held   a release, 5 ms at     what holds then; after
               are of short runs                   most                   5 ms listening
    listening  the last claim found the queues     a doorbell token,      ready
               empty                               BRPOP_TIMEOUT at most
    batching   as listening, and jobs of some      as listening, or the   ready
               queues wait for others              end of a batch window
    draining   the worker drains                   nothing                no claim is tried again

    A release is the end of a claim, a change of the queues, or the drain. The state is not stored:
    it follows from what is held and from what the last claim found.
    """

    def __init__(
        self,
        store: Store,
        consumer: QueueConsumer,
        held: HeldClaims,
        *,
        brpop_timeout_seconds: float,
        on_step: Callable[[Step], None],
    ) -> None:
        """Has no queues until `serve` is called. `on_step` is called for each doorbell token; only
        tests need it."""
        self.queues: Mapping[str, QueueBatching] = {}
        """The queues to claim from."""
        self.draining = asyncio.Event()
        """Set once nothing more is to be claimed."""
        self.turn = asyncio.Lock()
        """The slot that waits or claims holds it: only one does at a time."""
        self.seen_empty = False
        """Whether the last claim found the queues empty. The doorbell rings for every job that came
        after it, and for those that it left behind: to claim again at once found nothing, and cost
        a waiting client half its time."""
        self.windows = BatchWindows(store, consumer, self._is_idle, brpop_timeout_seconds)
        self._held = held
        self._brpop_timeout_seconds = brpop_timeout_seconds
        self._on_step = on_step
        self._is_growing = False
        self._doorbell = Doorbell(store)
        self._doorbell_task: asyncio.Task[str | None] | None = None
        """A wait on the doorbell that goes on although its slot went to claim a due queue."""
        self._awaits_doorbell = False
        self._has_deferred = False
        self._waits_begun = 0

    def serve(self, queues: Mapping[str, QueueBatching], *, is_growing: bool = False) -> None:
        """Replaces the queues, and returns at once. The next claim is tried without a doorbell
        token; a wait under way takes them up when it ends, which is within BRPOP_TIMEOUT.

        `is_growing` limits such waits to a tenth of a second, since more queues are about to come.
        """
        self.queues = queues
        self._is_growing = is_growing
        self.windows.serve(queues)
        self.seen_empty = False
        self._held.released_event.set()

    @property
    def state(self) -> WaitState:
        """The state of the slot that has the turn; while its claim is under way, the state in which
        it will be if that gives no jobs."""
        if self.draining.is_set():
            return "draining"
        if not (self.queues and self._held.allow_another()):
            return "blocked"
        if not self.seen_empty or self.windows.due:
            return "ready"
        if self.windows.queues:
            return "batching"
        if self._is_beside_short_runs() and not self._has_deferred:
            return "deferring"
        return "listening"

    async def wait(self) -> str | None:
        """Waits, without a limit, until the state is ready or draining. Returns the queue whose
        doorbell rang, None if none did."""
        self._has_deferred = False
        while (state := self.state) not in ("ready", "draining"):
            self.windows.notify_idle_slot()
            if state == "blocked":
                self.seen_empty = False
                await self._is_released_within(None)
            elif state == "deferring":
                self._has_deferred = not await self._is_released_within(_DEFER_SECONDS)
            else:
                rang = await (self._listen() if state == "listening" else self._listen_and_batch())
                self.seen_empty = False
                return rang
        return None

    async def ring_again(self, rang: str | None) -> None:
        """Rings the doorbell of this queue again, for another worker. Does nothing for None, or if
        Redis is away."""
        if rang:
            with contextlib.suppress(RedisUnavailable):
                await self._doorbell.ring(rang)

    async def ring_for_another_worker(self, queue: str) -> None:
        """Rings the doorbell of `queue` in half of all cases, for a job that was released since
        only others can run it. Does nothing if Redis is away.

        By chance, since two idle workers that take turns at the doorbell would go on as they began.
        """
        if random.random() < 0.5:
            await self.ring_again(queue)

    async def drain(self) -> None:
        """Ends all waits, after which nothing is claimed. Gives doorbell tokens of batch windows
        back, which may take a second; does not wait for the claims that are held."""
        self.draining.set()
        self._held.released_event.set()
        await self._doorbell.close()
        await self.windows.close()

    def _is_idle(self) -> bool:
        """Whether a slot waits for work and could claim some."""
        return self.turn.locked() and self.state not in ("draining", "blocked")

    def _is_beside_short_runs(self) -> bool:
        """Whether other slots run, and their next claims are near and take what comes meanwhile.

        One claim of sixteen jobs costs little more than one of four, and to wait on the doorbell
        beside a short run kept the run waiting. To defer saves 6 % of the CPU time of a job, and
        gives 19 % more jobs a second, with 32 clients that wait for their results.
        """
        claims = self._held.by_token.values()
        is_short = self._held.mean_run_seconds <= _SHORT_RUN_SECONDS
        return bool(claims) and is_short and all(held.emptied_queue for held in claims)

    async def _is_released_within(self, seconds: float | None) -> bool:
        """Waits for a release; returns whether there was one within `seconds`."""
        self._held.released_event.clear()
        return await set_within(self._held.released_event, seconds)

    async def _listen(self) -> str | None:
        """Waits on the doorbell of the queues without batch windows. Returns the queue that rang,
        None after the time limit, and while Redis is away."""
        queues = [queue for queue in self.queues if queue not in self.windows.queues]
        if not queues:
            await set_within(self.draining, self._brpop_timeout_seconds)
            return None
        seconds = self._brpop_timeout_seconds
        if self._is_growing:
            seconds = min(_GROWING_SECONDS, seconds)
        self._waits_begun += 1
        try:
            rang = await self._doorbell.wait(rotated(queues, self._waits_begun), seconds)
        except RedisUnavailable as error:
            if not self.draining.is_set():
                log_refused(_log, "Waiting", error)
                await pause_before_retry(self.draining)
            return None
        if rang:
            self._on_step("woken")
        return rang

    async def _listen_and_batch(self) -> str | None:
        """As `_listen`, but returns None as soon as a batch window has ended. The wait on the
        doorbell then goes on in `_doorbell_task`, and the next call takes it up."""
        loop = asyncio.get_running_loop()
        doorbell = self._doorbell_task or loop.create_task(self._listen_for_slot())
        self._doorbell_task = doorbell
        due = loop.create_task(self.windows.any_due.wait())
        either: set[asyncio.Task[Any]] = {doorbell, due}
        self._awaits_doorbell = True
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._awaits_doorbell = False
        due.cancel()
        if not doorbell.done():
            return None
        self._doorbell_task = None
        return doorbell.result()

    async def _listen_for_slot(self) -> str | None:
        """As `_listen`, for a slot that may stop waiting meanwhile: then it gives the token back,
        since another worker may need it, and returns None."""
        rang = await self._listen()
        if self._awaits_doorbell:
            return rang
        await self.ring_again(rang)
        return None
