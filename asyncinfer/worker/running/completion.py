"""Storing the outcomes of jobs: with their claim, or earlier when cancelled or expired."""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import (
    MAX_BYTES_PER_CALL,
    ClaimedJob,
    ClaimReply,
    ClaimRequest,
    FinishVerdict,
    JobOutcome,
    QueueConsumer,
)
from asyncinfer.repository.failed_jobs_log import FailedJobsLog
from asyncinfer.repository.leases import Renewal
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.schemas.operations import JobsDone
from asyncinfer.timeouts import pause_before_retry
from asyncinfer.worker.claiming.claims import Claimer
from asyncinfer.worker.held_claim import HeldClaim, HeldClaims, Step
from asyncinfer.worker.running.outcomes import OutcomeBuilder
from asyncinfer.worker.running.spans import JobSpans

_log = logging.getLogger(__name__)
_limited_log = LimitedLog(_log)

OnStored = Callable[[HeldClaim, Sequence[JobOutcome], Sequence[str]], None]
"""Is called with outcomes that were sent to Redis, and what it did with each."""

StartTask = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Finisher:
    """Stores the outcomes of one worker's jobs, and ends its claims. Its methods are called in the
    event loop."""

    def __init__(
        self,
        consumer: QueueConsumer,
        held: HeldClaims,
        claimer: Claimer,
        builder: OutcomeBuilder,
        *,
        start_task: StartTask,
        failed_jobs: FailedJobsLog,
        on_step: Callable[[Step], None],
        on_stored: OnStored,
        spans: JobSpans | None = None,
    ) -> None:
        """`start_task` starts a task that the worker waits for at its end; `spans` None: no end is
        traced."""
        self.verdict_counts: Counter[str] = Counter(completed=0, failed=0, cancelled=0)
        """How many outcomes this worker has stored since its start, by verdict; of these,
        "completed", "failed", "dead" and "cancelled" ended a job."""
        self._consumer = consumer
        self._held = held
        self._claimer = claimer
        self._builder = builder
        self._start_task = start_task
        self._failed_jobs = failed_jobs
        self._on_step = on_step
        self._on_stored = on_stored
        self._spans = spans
        self._given_up = False

    def jobs_done(self) -> JobsDone:
        """How many jobs ended here since the start, and how; dead letters count as failed."""
        counts = self.verdict_counts
        return JobsDone(counts["completed"], counts["failed"] + counts["dead"], counts["cancelled"])

    def give_up(self) -> None:
        """From now on storing is not tried again while Redis is away. A job whose outcome is not
        stored is redelivered when its lease ends."""
        self._given_up = True

    async def store_large(self, held: HeldClaim, finished: list[JobOutcome]) -> list[JobOutcome]:
        """Stores outcomes of a claim that is not finished if they would fill a call of their own,
        so that they are not in memory while its other jobs run. Returns those that were not
        stored: all, or none. Retries while Redis is away."""
        if sum(len(outcome.body) for outcome in finished) < MAX_BYTES_PER_CALL:
            return finished
        open_outcomes = [outcome for outcome in finished if outcome.job_id in held.open_jobs]
        for outcome in open_outcomes:
            held.open_jobs.pop(outcome.job_id, None)
        await self._store(held, open_outcomes, last=False)
        return []

    async def finish(self, held: HeldClaim, finished: Sequence[JobOutcome]) -> HeldClaim | None:
        """Call once the batches of a claim have run. Waits until outcomes of jobs that were
        cancelled or expired meanwhile are stored, then stores those of its other jobs and releases
        the claim. The same call claims the next jobs, so that a busy slot needs one call per batch.

        Returns the next claim, None where none came with the reply. Retries while Redis is away.
        """
        while held.early_tasks:
            await asyncio.wait(held.early_tasks)
        open_outcomes = [outcome for outcome in finished if outcome.job_id in held.open_jobs]
        held.open_jobs.clear()
        self._on_step("finishing")
        async with self._claimer.claim_lock:
            following = self._claimer.following_request(held)
            reply = await self._store(held, open_outcomes, last=True, following=following)
            self._held.release(held)
            self._on_step("finished")
            next_held = self._claimer.register(following, reply) if following else None
        await self._claimer.let_others_call()
        return next_held

    async def release(self, held: HeldClaim) -> None:
        """Gives the jobs without an outcome back to their queue, without a delay. Tries once: if
        Redis is away, they are redelivered when the lease ends.

        Does nothing for a claim without such jobs: it is being finished, or that has failed. Its
        lease stays: the jobs whose outcomes are not stored are redelivered when it ends.
        """
        if outcomes := self._builder.released(held, held.open_jobs.values(), "stopping"):
            held.open_jobs.clear()
            with contextlib.suppress(RedisUnavailable):
                await self._consumer.finish(held.claim, outcomes, last=not held.early_tasks)

    def apply_renewal(self, renewal: Renewal) -> None:
        """Ends jobs that were cancelled or have expired, and stops renewing claims that were lost,
        whose runs go on."""
        for held, job in self._open_jobs_of(renewal.cancelled):
            self._end_early(held, job, self._builder.cancelled(held, job))
        for held, job in self._open_jobs_of(renewal.expired):
            self._end_early(held, job, self._builder.expired(held, job))
        for token in renewal.lost:
            # A claim whose finish is under way has no open job, and its loss means nothing.
            lost = self._held.by_token.get(token)
            if lost and lost.open_jobs:
                _log.warning("A lease was lost; %d jobs go to others.", len(lost.open_jobs))
                self._held.stop_renewing(token)

    def _open_jobs_of(self, job_ids: Iterable[str]) -> list[tuple[HeldClaim, ClaimedJob]]:
        """Those of the jobs that this worker holds without an outcome, with their claims."""
        return [
            (held, held.open_jobs[job_id])
            for job_id in job_ids
            for held in self._held.by_token.values()
            if job_id in held.open_jobs
        ]

    def _end_early(self, held: HeldClaim, job: ClaimedJob, outcome: JobOutcome) -> None:
        """Ends one job of a claim now, and stores its outcome in a task; the other jobs run on. The
        run is stopped if no other job needs it."""
        del held.open_jobs[job.job_id]
        if held.run:
            held.run.abandon(job.job_id)
        task = self._start_task(self._store_early(held, outcome))
        held.early_tasks.add(task)
        task.add_done_callback(held.early_tasks.discard)

    async def _store_early(self, held: HeldClaim, outcome: JobOutcome) -> None:
        """Stores one outcome, and leaves the claim open."""
        await self._store(held, [outcome], last=False)

    async def _store(
        self,
        held: HeldClaim,
        outcomes: Sequence[JobOutcome],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> ClaimReply:
        """Stores outcomes, with retries while Redis is away, and counts them by verdict. `last`: no
        job of the claim is open any more, so that it ends.

        Returns the claim that `following` asked for. It has none where Redis refuses the outcomes
        (`following` is left out before that is accepted), or after `give_up`: those jobs are
        redelivered when their lease ends.
        """
        start_ns = time.time_ns() if self._spans else 0
        while True:
            try:
                verdicts, claimed = await self._consumer.finish(
                    held.claim, outcomes, last=last, following=following
                )
            except RedisRefused as error:
                # The same call would be refused again. The claim request in it may be the cause,
                # so the outcomes are sent once more without it.
                _limited_log.error(f"Finishing: {error.detail}")
                if following is None:
                    return ClaimReply(None)
                following = None
            except RedisUnavailable as error:
                if self._given_up:
                    return ClaimReply(None)
                log_refused(_limited_log, "Finishing", error)
                _log.debug("Finishing %d jobs waits for Redis.", len(outcomes))
                await pause_before_retry()
            else:
                self._note_stored(held, outcomes, verdicts, start_ns)
                return claimed

    def _note_stored(
        self,
        held: HeldClaim,
        outcomes: Sequence[JobOutcome],
        verdicts: Sequence[FinishVerdict],
        start_ns: int,
    ) -> None:
        """Counts, logs and traces what the queue made of the outcomes."""
        self.verdict_counts.update(verdicts)
        self._on_stored(held, outcomes, verdicts)
        for outcome, verdict in zip(outcomes, verdicts, strict=True):
            # A cancel that came first turns a failure into its own verdict.
            if outcome.outcome in ("failed", "dead") and verdict in ("failed", "dead", "already"):
                self._failed_jobs.note_outcome(held.claim.queue, outcome)
        if self._spans:
            self._spans.finished(held, outcomes, verdicts, start_ns)
        if stale := verdicts.count("stale"):
            _log.warning("%d results came too late: their jobs had been taken.", stale)
