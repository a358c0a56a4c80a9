"""A claim that this process holds, and the runs that it is divided into."""

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


class Run:
    """One batch in a thread; stopped for one reason, the first given."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.stop = Stop()
        self.why: Literal["", "abandoned", "timeout", "drain"] = ""
        self.wanted = {job.job_id for job in batch.jobs}

    def end(self, why: Literal["abandoned", "timeout", "drain"]) -> None:
        self.why = self.why or why
        self.stop.stop()

    def abandon(self, job_id: str) -> None:
        """One of its jobs has ended otherwise; a run that nobody wants stops."""
        self.wanted.discard(job_id)
        if not self.wanted:
            self.end("abandoned")


class Held:
    """A claim this process holds: the jobs without an outcome yet, and the run under way."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.claimed_at = time.monotonic()
        self.started_ms = time.time_ns() // 1_000_000
        self.ran_at = self.claimed_at
        self.run: Run | None = None
        self.early: set[asyncio.Task[None]] = set()

    @cached_property
    def open(self) -> dict[str, ClaimedJob]:
        return {job.job_id: job for job in self.claim.jobs}
