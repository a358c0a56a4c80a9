"""Claiming for all slots of one process: which claims it holds, and when it makes the next."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import (
    MAX_QUEUES_PER_CLAIM,
    ClaimReply,
    ClaimRequest,
    QueueConsumer,
)
from asyncinfer.repository.doorbell import Doorbell
from asyncinfer.repository.store import Store
from asyncinfer.worker.claiming.batch_window import BatchWindows, QueueBatching
from asyncinfer.worker.held_claim import HeldClaim, Step
from asyncinfer.worker.lease_renewer import LeaseRenewer

_log = LimitedLog(logging.getLogger(__name__))

T = TypeVar("T")

_LOW_FIRST_EVERY: Final = 16
"""One round of claims in so many takes jobs of low priority first."""

_SHORT_RUN_SECONDS: Final = 0.0015
"""A run as short as this gains nothing from a second one beside it."""

_GROWING_SECONDS: Final = 0.1
"""How long one wait on the doorbell lasts while models are loaded: queues that come meanwhile are
not among those it waits for."""

_BUSY_SLOT_SECONDS: Final = 0.005
"""How long to skip the doorbell wait when a running slot is about to claim anyway."""


class Claimer:
    """Makes the claims of one process, one at a time, and keeps those that are not finished. There
    is one instance per worker, and its slots call `next` and `finish`.

    A free slot waits, in this order, for: a claim that allows no other beside it to be released; a
    short run that will claim again anyway (at most 5 ms); a doorbell token or the end of a batch
    window. Then it claims.
    """

    def __init__(
        self,
        store: Store,
        runs: QueueConsumer,
        renewer: LeaseRenewer,
        queues: Mapping[str, QueueBatching],
        *,
        max_batch: int,
        brpop_timeout_seconds: float,
        on_step: Callable[[Step], None],
    ) -> None:
        """`max_batch` is the most jobs of one claim. `on_step` is called in the event loop at each
        step; only tests need it."""
        self.held: dict[str, HeldClaim] = {}
        """By token, the claims that are not finished."""
        self.draining = asyncio.Event()
        """Set once nothing more is to be claimed."""
        self._runs = runs
        self._renewer = renewer
        self._max_batch = max_batch
        self._brpop_timeout_seconds = brpop_timeout_seconds
        self._on_step = on_step
        self._doorbell = Doorbell(store)
        self._doorbell_task: asyncio.Task[str | None] | None = None
        """A wait on the doorbell that goes on although its slot went to claim a due queue."""
        self._awaits_doorbell = False
        self._waiting_turn = asyncio.Lock()
        self.windows = BatchWindows(store, runs, self._is_idle, brpop_timeout_seconds)
        self._claiming = asyncio.Lock()
        self._released_event = asyncio.Event()
        self._exclusive_pending = False
        """Whether the next job must run with nothing beside it, so that no claim gives any now."""
        self._seen_empty = False
        """Whether to wait for the doorbell before the next claim: set by a claim call, since the
        doorbell rings for every job that the call leaves behind."""
        self._requests_sent = 0
        self._claims_made = 0
        self._mean_run_seconds = 0.0
        """From a claim to its outcomes, a running mean."""
        self.serve(queues)

    def serve(self, queues: Mapping[str, QueueBatching], *, is_growing: bool = False) -> None:
        """Replaces the queues to claim from, and returns at once. The next claim checks them
        without a doorbell token; a wait under way takes them up when it ends, which is within
        BRPOP_TIMEOUT.

        `is_growing` limits such waits to a tenth of a second, since more queues are about to come.
        """
        self._queues = list(queues)
        self._is_growing = is_growing
        self._unbatched = {name for name, batching in queues.items() if not batching.is_batched}
        self.windows.serve(queues)
        self._seen_empty = False
        self._released_event.set()

    async def ring_for_another_worker(self, queue: str) -> None:
        """Rings the doorbell of `queue` in half of all cases, for a job that was released since
        only others can run it. Does nothing if Redis is away.

        By chance, since two idle workers that take turns at the doorbell would go on as they began.
        """
        if random.random() < 0.5:
            await self._ring_again(queue)

    def stop_renewing(self, token: str) -> None:
        """Stops renewing the lease of a claim that was lost; the claim stays in `held` until it is
        finished. An unknown token is ignored."""
        self._renewer.remove(token)

    async def drain(self) -> None:
        """Claims nothing more: `next` returns None, also in slots that wait. Gives doorbell tokens
        of batch windows back, which may take a second; does not wait for the claims that are
        held."""
        self.draining.set()
        self._released_event.set()
        await self._doorbell.close()
        await self.windows.close()

    async def next(self) -> HeldClaim | None:
        """Waits, without a limit, for work and claims it; only one slot waits at a time. Returns
        None once the worker drains. Retries while Redis is away.

        A claim that leaves work behind rings the doorbell, so after a claim the doorbell is waited
        for first: to claim again at once found nothing, and cost a waiting client half its time.
        """
        rang: str | None = None
        async with self._waiting_turn:
            while not self.draining.is_set():
                self.windows.notify_idle_slot()
                if self._must_not_claim():
                    await self._ring_again(rang)
                    rang, self._seen_empty = None, False
                    await self._wait_until_released()
                elif self._seen_empty and not self.windows.due:
                    rang = None
                    if not await self._defer_to_busy_slot():
                        rang = await self._wait_for_work()
                        self._seen_empty = False
                elif held := await self._claim_any_queue(rang):
                    return held
            await self._ring_again(rang)
        return None

    async def finish(
        self,
        held: HeldClaim,
        store_outcomes: Callable[[ClaimRequest | None], Awaitable[ClaimReply]],
    ) -> HeldClaim | None:
        """Calls `store_outcomes` with the request for the next claim, None if there is to be none,
        while no other claim call is made. Then releases `held`: it leaves `self.held`, and its
        lease is no longer renewed. If `store_outcomes` raises, the claim stays held.

        Returns the next claim, which `store_outcomes` has returned; None if there is none.
        """
        async with self._claiming:
            following = self._following_request(held)
            claimed = await store_outcomes(following)
            run_seconds = held.run_ended_at - held.claimed_at
            self._mean_run_seconds += 0.2 * (run_seconds - self._mean_run_seconds)
            self._renewer.remove(held.claim.token)
            self.held.pop(held.claim.token, None)
            self._on_step("finished")
            next_held = self._register(claimed, following) if following else None
            self._released_event.set()
        await self._yield_to_other_slots()
        return next_held

    async def _wait_for_work(self) -> str | None:
        """The queue whose doorbell rang; None once a batch window has ended, while Redis is away,
        and after BRPOP_TIMEOUT, when an idle worker claims in any case. Once a window has ended,
        the wait on the doorbell goes on in `_doorbell_task`."""
        if not self.windows.queues:
            return await self._wait_on_doorbell(self._rotated_queues(None))
        loop = asyncio.get_running_loop()
        doorbell = self._doorbell_task or loop.create_task(self._doorbell_for_slot())
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

    async def _doorbell_for_slot(self) -> str | None:
        """Waits for the doorbell of queues without batch windows; returns the one that rang, None
        if none did in time.

        May go on after the slot has stopped waiting: then the token is given back, since another
        worker may need it, and it returns None.
        """
        queues = [queue for queue in self._rotated_queues(None) if queue not in self.windows.queues]
        if queues:
            rang = await self._wait_on_doorbell(queues)
        else:
            rang = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._brpop_timeout_seconds):
                    await self.draining.wait()
        if not self._awaits_doorbell:
            await self._ring_again(rang)
            return None
        return rang

    async def _wait_on_doorbell(self, queues: Sequence[str]) -> str | None:
        """The queue whose doorbell rang; None after the time limit. While Redis is away it returns
        None after a pause of up to half a second, or at once when draining."""
        seconds = self._brpop_timeout_seconds
        if self._is_growing:
            seconds = min(_GROWING_SECONDS, seconds)
        try:
            rang = await self._doorbell.wait(queues, seconds)
        except RedisUnavailable as error:
            if not self.draining.is_set():
                _log.warning(f"Waiting: {error.detail}")
                await asyncio.sleep(random.uniform(0.1, 0.5))
            return None
        if rang:
            self._on_step("woken")
        return rang

    async def _defer_to_busy_slot(self) -> bool:
        """Waits up to 5 ms for a slot with a short run that had emptied its queue, if there is one;
        returns at once if there is none, or if any claim here is of another kind.

        Returns whether it has finished, or the queues have changed: its next claim takes the new
        jobs. One claim of sixteen jobs costs little more than one of four, and to wait on the
        doorbell beside a run kept the run waiting.
        """
        is_short = self._mean_run_seconds <= _SHORT_RUN_SECONDS and not self.windows.queues
        if not self.held or not is_short:
            return False
        if not all(map(self._emptied_its_queue, self.held.values())):
            return False
        self._released_event.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BUSY_SLOT_SECONDS):
                await self._released_event.wait()
        return self._released_event.is_set()

    def _emptied_its_queue(self, held: HeldClaim) -> bool:
        """Whether a claim took all jobs that waited in its queue, as it has fewer than MAX_BATCH.
        False for a queue whose jobs do not share runs."""
        return held.claim.count < self._max_batch and held.claim.queue not in self._unbatched

    async def _ring_again(self, rang: str | None) -> None:
        """Rings the doorbell of this queue again, for another worker. Does nothing for None, or if
        Redis is away."""
        if rang:
            with contextlib.suppress(RedisUnavailable):
                await self._doorbell.ring(rang)

    def _must_not_claim(self) -> bool:
        """Whether there is no queue, or a claim here or the next job allows no other beside it:
        a redelivered job and a suspect run alone in their process.

        Forgets that such a job is next once nothing is held here.
        """
        if not self._queues:
            return True
        if not self.held:
            self._exclusive_pending = False
        return self._exclusive_pending or any(held.claim.exclusive for held in self.held.values())

    def _is_idle(self) -> bool:
        """Whether a slot waits for work and could claim some."""
        return self._waiting_turn.locked() and not self._must_not_claim()

    async def _wait_until_released(self) -> None:
        """Waits until a claim is released, the queues change or the worker drains. Returns at once
        if a claim may be made now."""
        self._released_event.clear()
        if self._must_not_claim() and not self.draining.is_set():
            await self._released_event.wait()

    async def _claim_any_queue(self, rang: str | None) -> HeldClaim | None:
        """Claims from the first queue that has jobs, beginning with the one that rang; None if no
        queue has any, or none may be claimed now.

        A claim call covers few queues, so for many queues a cheaper call checks first whether any
        has work. Raises RedisRefused if Redis refuses that call.
        """
        self._seen_empty = True
        queues = self._claimable_queues(rang)
        if len(queues) > MAX_QUEUES_PER_CLAIM and not rang:
            has_work = await self._retry_until_answered(lambda: self._runs.has_work(queues), False)
            if not has_work:
                self.windows.clear_due(queues)
                return None
        for start in range(0, len(queues), MAX_QUEUES_PER_CLAIM):
            if held := await self._claim_group(queues[start : start + MAX_QUEUES_PER_CLAIM]):
                return held
        return None

    async def _claim_group(self, queues: Sequence[str]) -> HeldClaim | None:
        """Claims from at most MAX_QUEUES_PER_CLAIM queues in one call; from each alone where Redis
        refuses that, which is logged. None if that gives no jobs."""
        try:
            return await self._claim_once(queues)
        except RedisRefused as error:
            _log.error(f"Claiming: {error.detail}")
        # A damaged key of one queue must not starve the others.
        for queue in queues:
            with contextlib.suppress(RedisRefused):
                if held := await self._claim_once([queue]):
                    return held
        return None

    async def _claim_once(self, queues: Sequence[str]) -> HeldClaim | None:
        """Makes one claim call. Returns None where there are no jobs, or none may be claimed now;
        raises RedisRefused."""
        # One claim call at a time: with two under way, a poison job could come with one of them
        # while the other brings jobs that would then be lost with it.
        async with self._claiming:
            if self._must_not_claim() or self.draining.is_set():
                return None
            request = self._new_request(queues, held=bool(self.held))
            try:
                claimed = await self._retry_until_answered(
                    lambda: self._runs.claim(request), ClaimReply(None)
                )
            except RedisRefused:
                self.windows.clear_due(queues)
                raise
            held = self._register(claimed, request)
        await self._yield_to_other_slots()
        return held

    async def _yield_to_other_slots(self) -> None:
        """Lets another slot send its call before this one decodes its claim, so that Redis works
        while this process does. It made a drain a third faster."""
        if len(self.held) > 1:
            await asyncio.sleep(0)

    def _following_request(self, held: HeldClaim) -> ClaimRequest | None:
        """The request for the next claim, which is sent with the outcomes of `held`; None when
        draining, where nothing may be claimed beside the other claims, or where there is no queue
        to claim from."""
        others = [other for token, other in self.held.items() if token != held.claim.token]
        if not self._queues or self.draining.is_set():
            return None
        if others and (self._exclusive_pending or any(other.claim.exclusive for other in others)):
            return None
        queues = self._claimable_queues(None)[:MAX_QUEUES_PER_CLAIM]
        return self._new_request(queues, held=bool(others)) if queues else None

    def _new_request(self, queues: Sequence[str], *, held: bool) -> ClaimRequest:
        """A request with a token of its own; counts it. `held`: whether this process holds another
        claim, so that it must get no job that runs alone."""
        self._requests_sent += 1
        # Counted in whole rounds of all queues, or the same queue would be favoured each time; and
        # in claims, since a request that got no jobs has not had its turn.
        rounds = self._claims_made // len(self._queues)
        return ClaimRequest(
            tuple(queues),
            self._runs.new_token(),
            held,
            self._max_batch,
            low_first=rounds % _LOW_FIRST_EVERY == _LOW_FIRST_EVERY - 1,
            one_at_a_time=tuple(queue for queue in queues if queue in self._unbatched),
        )

    def _rotated_queues(self, first: str | None) -> list[str]:
        """All queues, beginning with `first` if it is one of them, else with another one each time:
        BRPOP and claim serve queues in the order given. Needs at least one queue."""
        start = self._queues.index(first) if first in self._queues else self._requests_sent
        start %= len(self._queues)
        return self._queues[start:] + self._queues[:start]

    def _claimable_queues(self, first: str | None) -> list[str]:
        """As `_rotated_queues`, without those whose jobs still wait for others."""
        return [queue for queue in self._rotated_queues(first) if not self.windows.must_wait(queue)]

    def _register(self, claimed: ClaimReply, request: ClaimRequest) -> HeldClaim | None:
        """Takes up the reply to `request`: keeps its claim and has its lease renewed, or notes that
        an exclusive job is next. The queue of the claim is no longer due, nor are all queues of the
        request if they were empty. Returns the claim, None where the reply has none."""
        self._exclusive_pending = claimed.is_blocked
        if claimed.claim is None:
            if not claimed.is_blocked:
                self.windows.clear_due(request.queues)
            return None
        self.windows.clear_due([claimed.claim.queue])
        self._claims_made += 1
        held = self.held[claimed.claim.token] = HeldClaim(claimed.claim)
        self._renewer.add(claimed.claim)
        self._on_step("claimed")
        return held

    async def _retry_until_answered(self, call: Callable[[], Awaitable[T]], otherwise: T) -> T:
        """Repeats a call that may be sent twice until Redis answers, and returns the answer.

        Returns `otherwise` when draining: jobs that a lost reply has claimed are redelivered when
        their lease ends. Raises RedisRefused.
        """
        while True:
            try:
                return await call()
            except RedisRefused:
                raise
            except RedisUnavailable as error:
                if self.draining.is_set():
                    return otherwise
                _log.warning(f"Claiming: {error.detail}")
                await asyncio.sleep(random.uniform(0.1, 0.5))
