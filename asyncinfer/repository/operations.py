"""What people do to many jobs at once: pause, resume or purge a queue; cancel, retry, forget."""

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import Struct

from asyncinfer.jobs import STATUSES
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import Stored, next_round, queue_of, read_states
from asyncinfer.repository.submissions import RetryVerdict, Submissions

_JOBS_A_CALL: Final = 200
"""So that no call holds up the server for longer than some ms."""

_MOST_ROUNDS: Final = 5


class Cancelled(Struct, frozen=True):
    """Of many jobs, how many ended, and how many that run were told to."""

    ended: int
    asked: int


class Operation:
    """The verbs on whole queues, and on many jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._submissions = Submissions(store)

    async def pause(self, queue: str, *, paused: bool) -> bool:
        """Stops or resumes giving jobs out, while they are still taken in; whether that is new."""
        return bool(
            await self._store.call(script("pause"), [queue], [encode_args({"is_paused": paused})])
        )

    async def purge(self, queue: str) -> int:
        """Ends all jobs that wait as cancelled, 1,000 a call; returns how many."""
        args = [encode_args(self._store.policy.ending())]
        ended, left = await self._store.call(script("purge"), [queue], args)
        while left:
            more, left = await self._store.call(script("purge"), [queue], args)
            ended += more
        return int(ended)

    async def cancel(self, jobs: Sequence[Stored]) -> Cancelled:
        """Ends those that wait and asks for the end of those that run."""
        ended = asked = 0
        for part in self._parts(jobs):
            verdicts = await self._submissions.cancel_many(part)
            ended += verdicts.count("cancelled")
            asked += verdicts.count("stopping")
        return Cancelled(ended, asked)

    async def forget(self, jobs: Sequence[Stored]) -> int:
        """Deletes those that have ended; how many that were. One that was there and is not now
        counts as well: the first reply to this very call may have been lost."""
        forgotten = 0
        for part in self._parts(jobs):
            verdicts = await self._submissions.forget_many(part)
            forgotten += len(part) - verdicts.count("unfinished")
        return forgotten

    async def retry(self, jobs: Sequence[Stored], now_ms: int) -> dict[str, RetryVerdict]:
        """Opens a new round of each that failed or was cancelled; by id, what came of it."""
        verdicts: dict[str, RetryVerdict] = {}
        for _ in range(_MOST_ROUNDS):
            for part in self._parts(jobs):
                found = await self._submissions.retry_many(part, now_ms)
                verdicts |= {job.job_id: one for job, one in zip(part, found, strict=True)}
            tried = [job for job in jobs if verdicts[job.job_id] == "changed"]
            if not tried:
                break
            now = await read_states(self._store, [job.job_id for job in tried], STATUSES)
            changed = {job.job_id: job for job in now}
            for before in tried:
                after = changed.get(before.job_id)
                if after is None:
                    verdicts[before.job_id] = "absent"
                elif _is_opened(before, after, now_ms):
                    verdicts[before.job_id] = "ok"
            jobs = [job for job in now if verdicts[job.job_id] == "changed"]
        return verdicts

    def _parts(self, jobs: Sequence[Stored]) -> Iterator[list[Stored]]:
        """Jobs as they fit one call each: of one queue, and not too many."""
        by_queue: dict[str, list[Stored]] = {}
        for job in jobs:
            by_queue.setdefault(queue_of(self._store, job), []).append(job)
        for queued in by_queue.values():
            for start in range(0, len(queued), _JOBS_A_CALL):
                yield queued[start : start + _JOBS_A_CALL]


def _is_opened(before: Stored, after: Stored, now_ms: int) -> bool:
    """Whether the new round is the one opened here, by a call whose first reply was lost."""
    if before.record is None or after.record is None:
        return False
    opened = next_round(before.record, now_ms)
    return (opened.round, now_ms) == (after.record.round, after.record.created_ms)
