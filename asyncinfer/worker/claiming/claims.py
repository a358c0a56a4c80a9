"""Claiming for all slots of one process: which queues, in what order, and one call at a time."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import (
    MAX_QUEUES_PER_CLAIM,
    ClaimReply,
    ClaimRequest,
    QueueConsumer,
)
from asyncinfer.repository.failed_jobs import FailedJobs
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.timeouts import pause_before_retry
from asyncinfer.worker.claiming.batch_window import rotated
from asyncinfer.worker.claiming.claim_waiter import ClaimWaiter
from asyncinfer.worker.held_claim import HeldClaim, HeldClaims, Step
from asyncinfer.worker.output_sizes import OutputSizes

_log = LimitedLog(logging.getLogger(__name__))

T = TypeVar("T")

_LOW_FIRST_EVERY: Final = 16
"""One round of claims in so many takes jobs of low priority first."""


class Claimer:
    """Makes the claims of one process, one at a time; there is one instance per worker.

    A slot gets its first claim from `next`, when `ClaimWaiter` finds that one should be tried. The
    claims after that come with the calls that store outcomes: who makes such a call holds
    `claim_lock`, sends `following_request` with it and passes the reply to `register`.
    """

    def __init__(
        self,
        consumer: QueueConsumer,
        held: HeldClaims,
        waiter: ClaimWaiter,
        output_sizes: OutputSizes,
        *,
        max_batch: int,
        on_step: Callable[[Step], None],
        on_failed: Callable[[Sequence[FailedJobs]], None],
    ) -> None:
        """Claims from the queues of `waiter`, until that drains. `max_batch` is the most jobs of
        one claim; it is fewer where `output_sizes` knows that their results are large. `on_step` is
        called for each claim; only tests need it. `on_failed` is called with the jobs that a claim
        found in a queue but could not take, and so ended as failed."""
        self.claim_lock = asyncio.Lock()
        """Held during each call that may claim: with two under way, a poison job could come with
        one of them while the other brings jobs that would then be lost with it."""
        self._consumer = consumer
        self._held = held
        self._waiter = waiter
        self._windows = waiter.windows
        self._output_sizes = output_sizes
        self._max_batch = max_batch
        self._on_step = on_step
        self._on_failed = on_failed
        self._requests_sent = 0
        self._claims_made = 0

    async def next(self) -> HeldClaim | None:
        """Waits, without a limit, for work and claims it; only one slot waits at a time. Returns
        None once the worker drains. Retries while Redis is away."""
        async with self._waiter.turn:
            while not self._waiter.draining.is_set():
                rang = await self._waiter.wait()
                is_draining = self._waiter.draining.is_set()
                if not is_draining and (held := await self._claim_any_queue(rang)):
                    return held
                if self._waiter.state in ("draining", "blocked"):
                    await self._waiter.ring_again(rang)
        return None

    def following_request(self, ending: HeldClaim) -> ClaimRequest | None:
        """The request for the claim after `ending`, which is sent with the outcomes of that; None
        when draining, where nothing may be claimed beside the other claims, or where there is no
        queue to claim from."""
        if self._waiter.draining.is_set() or not self._held.allow_another(beside=ending):
            return None
        queues = self._claimable_queues(None)[:MAX_QUEUES_PER_CLAIM]
        return self._new_request(queues, len(self._held.by_token) > 1) if queues else None

    def register(self, request: ClaimRequest, reply: ClaimReply) -> HeldClaim | None:
        """Takes up the reply to `request`: holds its claim, or notes that an exclusive job is next.
        The queue of the claim is no longer due, nor are all queues of the request if they were
        empty; one of which it took few jobs, for their large results, stays due. Returns the claim,
        None where the reply has none."""
        self._held.exclusive_pending = reply.is_blocked
        if reply.failed:
            self._on_failed(reply.failed)
        claim = reply.claim
        if claim is None:
            if not reply.is_blocked:
                self._windows.clear_due(request.queues)
            return None
        limit = request.limit(claim.queue)
        if claim.count < limit or limit == request.max_jobs:
            self._windows.clear_due([claim.queue])
        self._claims_made += 1
        held = HeldClaim(claim, emptied_queue=claim.count < limit)
        self._held.add(held)
        self._on_step("claimed")
        return held

    async def let_others_call(self) -> None:
        """Lets another slot send its call before this one decodes its claim, so that Redis works
        while this process does. A drain of a small model is 6 % faster for it on two busy cores, at
        the same CPU time a job."""
        if len(self._held.by_token) > 1:
            await asyncio.sleep(0)

    async def _claim_any_queue(self, rang: str | None) -> HeldClaim | None:
        """Claims from the first queue that has jobs, beginning with the one that rang; None if no
        queue has any, or none may be claimed now.

        A claim call covers few queues, so for many queues a cheaper call checks first whether any
        has work. Raises RedisRefused if Redis refuses that call.
        """
        self._waiter.seen_empty = True
        queues = self._claimable_queues(rang)
        if len(queues) > MAX_QUEUES_PER_CLAIM and not rang:
            has_work = await self._retry_until_answered(
                lambda: self._consumer.has_work(queues), False
            )
            if not has_work:
                self._windows.clear_due(queues)
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
        async with self.claim_lock:
            if self._waiter.state in ("draining", "blocked"):
                return None
            request = self._new_request(queues, bool(self._held.by_token))
            try:
                reply = await self._retry_until_answered(
                    lambda: self._consumer.claim(request), ClaimReply(None)
                )
            except RedisRefused:
                self._windows.clear_due(queues)
                raise
            held = self.register(request, reply)
        await self.let_others_call()
        return held

    def _new_request(self, queues: Sequence[str], is_holding: bool) -> ClaimRequest:
        """A request with a token of its own; counts it. `is_holding`: whether this process holds
        another claim, so that it must get no job that runs alone."""
        self._requests_sent += 1
        # Counted in whole rounds of all queues, or the same queue would be favoured each time; and
        # in claims, since a request that got no jobs has not had its turn.
        known = self._waiter.queues
        rounds = self._claims_made // len(known)
        return ClaimRequest(
            tuple(queues),
            self._consumer.new_token(),
            is_holding,
            self._max_batch,
            low_first=rounds % _LOW_FIRST_EVERY == _LOW_FIRST_EVERY - 1,
            max_jobs_of={
                queue: limit
                for queue in queues
                if (limit := self._max_jobs_of(queue)) < self._max_batch
            },
        )

    def _max_jobs_of(self, queue: str) -> int:
        """How many jobs of this queue share a claim, so that no slot holds what another one, or
        another worker, could run."""
        batching = self._waiter.queues.get(queue)
        # It is not known if the queues have changed while the claim waited for its turn.
        if batching and not batching.is_batched:
            return 1
        return self._output_sizes.fitting_jobs(queue) or self._max_batch

    def _claimable_queues(self, first: str | None) -> list[str]:
        """The queues whose jobs need not wait for others, beginning with `first` if it is one of
        them, else with another one each time."""
        queues = list(self._waiter.queues)
        start = queues.index(first) if first in queues else self._requests_sent
        return [queue for queue in rotated(queues, start) if not self._windows.must_wait(queue)]

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
                if self._waiter.draining.is_set():
                    return otherwise
                log_refused(_log, "Claiming", error)
                await pause_before_retry(self._waiter.draining)
