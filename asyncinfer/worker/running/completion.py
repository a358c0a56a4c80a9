"""Stores what became of jobs: with their claim, or before it when cancelled or expired."""

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from asyncinfer.errors import RedisRefused, RedisUnavailable
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository.claims import (
    Claimed,
    ClaimedJob,
    ClaimRequest,
    Finished,
    PackedOutcomes,
    Runs,
    packed_outcomes,
)
from asyncinfer.repository.leases import Renewal
from asyncinfer.schemas.operations import JobsDone
from asyncinfer.worker.claiming.claims import Claims
from asyncinfer.worker.held_claim import Held, Step
from asyncinfer.worker.running.outcomes import Outcomes, released

log = logging.getLogger(__name__)
_limited_log = LimitedLog(log)

Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Finishing:
    """Ends the jobs of one worker's claims."""

    def __init__(
        self,
        runs: Runs,
        claims: Claims,
        outcomes: Outcomes,
        *,
        spawn: Spawn,
        on_step: Callable[[Step], None],
    ) -> None:
        self.ended: Counter[str] = Counter(completed=0, failed=0, cancelled=0)
        """How many jobs came to which end here."""
        self._runs = runs
        self._claims = claims
        self._outcomes = outcomes
        self._spawn = spawn
        self._on_step = on_step
        self._given_up = False

    def jobs_done(self) -> JobsDone:
        """How many jobs ended here, and how; what was retried too often has failed."""
        ended = self.ended
        return JobsDone(ended["completed"], ended["failed"] + ended["dead"], ended["cancelled"])

    def give_up(self) -> None:
        """What cannot be stored at once comes back by its lease."""
        self._given_up = True

    async def finish(self, held: Held, finished: Sequence[Finished]) -> Held | None:
        """Ends a claim; the next one comes back, when one came with the answer."""
        while held.early:
            await asyncio.wait(held.early)
        outcomes = packed_outcomes([one for one in finished if one.job_id in held.open])
        held.open.clear()
        self._on_step("finishing")
        return await self._claims.finish(
            held,
            lambda following: self._stored(held, outcomes, last=True, following=following),
        )

    async def release(self, held: Held) -> None:
        """Hands back what is open. A claim with nothing open is being finished, or was tried to
        be: what that did not store comes back by its lease, which must not go before."""
        if left := released(held.open.values()):
            held.open.clear()
            with contextlib.suppress(RedisUnavailable):
                await self._runs.finish(held.claim, left, last=not held.early)

    def heard(self, what: str, job_id: str) -> None:
        """Ends a job that runs, if it runs here."""
        for held in list(self._claims.held.values()):
            if job := held.open.get(job_id):
                if what == "cancel":
                    self._end_early(held, job, self._outcomes.cancelled(held, job))
                elif what == "expire":
                    self._end_early(held, job, self._outcomes.expired(held, job))

    def renewed(self, renewal: Renewal) -> None:
        for job_id in renewal.cancelled:
            self.heard("cancel", job_id)
        for job_id in renewal.expired:
            self.heard("expire", job_id)
        for token in renewal.lost:
            # A claim whose finish is under way has nothing open, and its loss means nothing.
            held = self._claims.held.get(token)
            if held and held.open:
                log.warning("A lease was lost; %d jobs go to others.", len(held.open))
                self._claims.let_go(token)

    def _end_early(self, held: Held, job: ClaimedJob, outcome: Finished) -> None:
        """Ends one job of a claim now; the others run on."""
        del held.open[job.job_id]
        if held.run:
            held.run.abandon(job.job_id)
        task = self._spawn(self._store_early(held, outcome))
        held.early.add(task)
        task.add_done_callback(held.early.discard)

    async def _store_early(self, held: Held, outcome: Finished) -> None:
        await self._stored(held, packed_outcomes([outcome]), last=False)

    async def _stored(
        self,
        held: Held,
        outcomes: Sequence[PackedOutcomes],
        *,
        last: bool,
        following: ClaimRequest | None = None,
    ) -> Claimed:
        """Stores outcomes, however long Redis is away; what they are stays in memory until then."""
        while True:
            try:
                verdicts, claimed = await self._runs.finish_packed(
                    held.claim, outcomes, last=last, following=following
                )
            except RedisRefused as error:
                # The same call again would be refused again. What rides on it may be to blame;
                # what is not stored comes back by its lease.
                _limited_log.error(f"Finishing: {error.detail}")
                if following is None:
                    return Claimed(None)
                following = None
            except RedisUnavailable as error:
                if self._given_up:
                    return Claimed(None)
                _limited_log.warning(f"Finishing: {error.detail}")
                await asyncio.sleep(random.uniform(0.1, 0.5))
            else:
                self.ended.update(verdicts)
                if stale := verdicts.count("stale"):
                    log.warning("%d results came too late: their jobs had been taken.", stale)
                return claimed
