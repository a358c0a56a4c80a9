"""The claims that this process holds, and the runs of their batches."""

import asyncio
import time
from collections import deque
from functools import cached_property
from typing import Final, Literal

from asyncinfer.engine import Stop
from asyncinfer.jobs import Delivery, TraceContext, now_ms
from asyncinfer.repository.claims import Claim, ClaimedJob
from asyncinfer.worker.execution import Batch
from asyncinfer.worker.lease_renewer import LeaseRenewer

Step = Literal["woken", "claimed", "running", "finishing", "finished"]
"""What a worker has just done or is about to do; tests stop a worker at one of these."""

_MAX_EARLY: Final = 1000
"""As many as a control stream keeps."""

StopReason = Literal["abandoned", "timeout", "drain"]


class BatchRun:
    """One batch that runs in a thread, and why it was stopped, if it was. Its methods are called in
    the event loop."""

    def __init__(self, batch: Batch, delivery: Delivery) -> None:
        """`delivery` is what the records of its jobs will say of it."""
        self.batch = batch
        self.delivery = delivery
        self.stop = Stop()
        self.stop_reason: StopReason | None = None
        self.wanted_ids = {job.job_id for job in batch.jobs}
        """Jobs of the batch that still need its result."""

    def stop_for(self, reason: StopReason) -> None:
        """Makes the run end before its next kernel, and returns at once; only the first reason is
        kept."""
        self.stop_reason = self.stop_reason or reason
        self.stop.stop()

    def abandon(self, job_id: str) -> None:
        """Notes that a job was cancelled or expired; stops the run if no job needs it any more."""
        self.wanted_ids.discard(job_id)
        if not self.wanted_ids:
            self.stop_for("abandoned")


class HeldClaim:
    """A claim that this process holds: its jobs without an outcome, and the run under way. It lives
    until its outcomes are stored."""

    def __init__(self, claim: Claim, *, emptied_queue: bool) -> None:
        """`emptied_queue`: whether the claim took all jobs that waited in its queue, as it has
        fewer than it could have."""
        self.claim = claim
        self.emptied_queue = emptied_queue
        self.claimed_at = time.monotonic()
        """On the monotonic clock, in seconds."""
        self.started_ms = now_ms()
        """The same moment as Unix time."""
        self.run_ended_at = self.claimed_at
        """When its last batch had run, on the monotonic clock; `claimed_at` until then."""
        self.run: BatchRun | None = None
        self.early_tasks: set[asyncio.Task[None]] = set()
        """Tasks that store outcomes of jobs that were cancelled or expired during the run."""
        self.traces: dict[str, TraceContext] = {}
        """By id the jobs whose traces are recorded; empty without TRACES."""
        self.run_traces: dict[str, TraceContext] = {}
        """By id the span of the last run that a job was in."""

    @cached_property
    def delivery(self) -> Delivery:
        """What the records of jobs of this claim say of it that do not run."""
        return Delivery(self.claim.claimed_ms, self.claim.count)

    def age_ms(self) -> int:
        """How long ago it was claimed, in whole ms, whatever happens to the clock."""
        return int((time.monotonic() - self.claimed_at) * 1000)

    def delivery_of_run(self, batch: Batch) -> Delivery:
        """What the records of jobs of this claim say of it and of their run, which begins now."""
        return Delivery(
            self.claim.claimed_ms,
            self.claim.count,
            self.age_ms(),
            len(batch.jobs),
            sum(batch.rows),
            batch.engine.provider.removesuffix("ExecutionProvider"),
        )

    def run_of(self, job_id: str) -> BatchRun | None:
        """The run under way that a job is in; None if it is in none."""
        return self.run if self.run and job_id in self.run.wanted_ids else None

    @cached_property
    def open_jobs(self) -> dict[str, ClaimedJob]:
        """By id the jobs that have no outcome yet, in the order of the claim. A job is removed just
        before its outcome is stored."""
        return {job.job_id: job for job in self.claim.jobs}


class HeldClaims:
    """All claims that this process holds, and whether it may make another beside them."""

    def __init__(self, renewer: LeaseRenewer) -> None:
        self.by_token: dict[str, HeldClaim] = {}
        self.exclusive_pending = False
        """Whether the next job must run with nothing beside it, as the last claim call has said."""
        self.released_event = asyncio.Event()
        """Set at each release of a claim; who waits for one clears it first."""
        self.mean_run_seconds = 0.0
        """From a claim to the end of its runs, a running mean."""
        self._renewer = renewer
        self._early_ids: deque[str] = deque(maxlen=_MAX_EARLY)
        """The jobs of messages since the last claim that were about jobs not held. Only one claim
        call is under way at a time, so that older messages were about jobs of others."""

    def check_job(self, job_id: str) -> None:
        """Call when a message says that something has happened to a job: if this process holds it,
        its leases are renewed, which tells what. The message may overtake the reply of the claim
        that has the job, and may be older than the claim; so it is only taken as a hint."""
        if any(job_id in held.open_jobs for held in self.by_token.values()):
            self._renewer.renew_now()
        else:
            self._early_ids.append(job_id)

    def allow_another(self, *, beside: HeldClaim | None = None) -> bool:
        """Whether another claim may be made, or may follow `beside`, which is about to end: a
        redelivered job and a suspect run alone in their process."""
        others = [held for held in self.by_token.values() if held is not beside]
        return not others or not (
            self.exclusive_pending or any(held.claim.exclusive for held in others)
        )

    @property
    def is_isolating(self) -> bool:
        """Whether it may make no other claim at all until one has ended."""
        return not self.allow_another()

    def add(self, held: HeldClaim) -> None:
        """Holds a claim, and has its lease renewed."""
        self.by_token[held.claim.token] = held
        self._renewer.add(held.claim)
        if self._early_ids:
            if not held.open_jobs.keys().isdisjoint(self._early_ids):
                self._renewer.renew_now()
            self._early_ids.clear()

    def stop_renewing(self, token: str) -> None:
        """Stops renewing the lease of a claim that was lost, which stays held until it is
        finished."""
        self._renewer.remove(token)

    def release(self, held: HeldClaim) -> None:
        """Ends a claim whose outcomes are stored: its lease is no longer renewed."""
        run_seconds = held.run_ended_at - held.claimed_at
        self.mean_run_seconds += 0.2 * (run_seconds - self.mean_run_seconds)
        self.stop_renewing(held.claim.token)
        del self.by_token[held.claim.token]
        self.released_event.set()
