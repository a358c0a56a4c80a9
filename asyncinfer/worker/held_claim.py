"""A claim that this process holds, and the run of one of its batches."""

import asyncio
import time
from functools import cached_property
from typing import Literal

from asyncinfer.engine import Stop
from asyncinfer.repository.claims import (
    Claim,
    ClaimedJob,
)
from asyncinfer.worker.execution import Batch

Step = Literal["woken", "claimed", "running", "finishing", "finished"]
"""What a worker has just done or is about to do; tests stop a worker at one of these."""

StopReason = Literal["abandoned", "timeout", "drain"]


class BatchRun:
    """One batch that runs in a thread, and why it was stopped, if it was. Its methods are called in
    the event loop."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
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

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.claimed_at = time.monotonic()
        """On the monotonic clock, in seconds."""
        self.started_ms = time.time_ns() // 1_000_000
        """The same moment as Unix time."""
        self.run_ended_at = self.claimed_at
        """When its last batch had run, on the monotonic clock; `claimed_at` until then."""
        self.run: BatchRun | None = None
        self.early_tasks: set[asyncio.Task[None]] = set()
        """Tasks that store outcomes of jobs that were cancelled or expired during the run."""

    @cached_property
    def open_jobs(self) -> dict[str, ClaimedJob]:
        """By id the jobs that have no outcome yet, in the order of the claim. A job is removed just
        before its outcome is stored."""
        return {job.job_id: job for job in self.claim.jobs}
