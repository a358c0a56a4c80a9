"""What people do to many jobs at once: pause, resume or purge a queue; cancel, retry, forget."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, cast

from msgspec import Struct

from asyncinfer.jobs import STATUSES, encode_record, is_later, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import Stored, next_round, queue_of, read_states
from asyncinfer.repository.submissions import packed_options, round_options
from asyncinfer.untrusted import decoding

_JOBS_A_CALL: Final = 200
"""So that no call holds up the server for longer than some ms."""

_MOST_ROUNDS: Final = 5


CancelVerdict = Literal["cancelled", "stopping", "finished", "absent"]
_CANCEL_VERDICTS: Final = ("cancelled", "stopping", "absent")
ForgetVerdict = Literal["forgotten", "absent", "unfinished"]
RetryVerdict = Literal["ok", "changed", "full", "no_input", "not_retryable", "absent", "later"]


class Cancelled(Struct, frozen=True):
    """Of many jobs, how many ended, and how many that run were told to."""

    ended: int
    asked: int


class Operations:
    """The verbs on whole queues, and on many jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

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

    async def cancel(self, stored: Stored) -> CancelVerdict:
        """Ends a waiting job, or asks for the end of a running one."""
        return (await self._cancel_together([stored]))[0]

    async def cancel_all(self, jobs: Sequence[Stored]) -> Cancelled:
        """Ends those that wait and asks for the end of those that run."""
        ended = asked = 0
        for part in self._parts(jobs):
            verdicts = await self._cancel_together(part)
            ended += verdicts.count("cancelled")
            asked += verdicts.count("stopping")
        return Cancelled(ended, asked)

    async def forget(self, stored: Stored) -> ForgetVerdict:
        """Deletes an ended job with all its data."""
        return (await self._forget_together([stored]))[0]

    async def forget_all(self, jobs: Sequence[Stored]) -> int:
        """Deletes those that have ended; how many that were. One that was there and is not now
        counts as well: the first reply to this very call may have been lost."""
        forgotten = 0
        for part in self._parts(jobs):
            verdicts = await self._forget_together(part)
            forgotten += len(part) - verdicts.count("unfinished")
        return forgotten

    async def retry(self, stored: Stored, now_ms: int) -> RetryVerdict:
        """Opens a new round of a failed or cancelled job."""
        return (await self._retry_together([stored], now_ms))[0]

    async def retry_all(self, jobs: Sequence[Stored], now_ms: int) -> dict[str, RetryVerdict]:
        """Opens a new round of each that failed or was cancelled; by id, what came of it."""
        verdicts: dict[str, RetryVerdict] = {}
        for _ in range(_MOST_ROUNDS):
            for part in self._parts(jobs):
                found = await self._retry_together(part, now_ms)
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

    async def _cancel_together(self, jobs: Sequence[Stored]) -> list[CancelVerdict]:
        """One script call for jobs of one queue; some tens of ms for a thousand."""
        args: list[Any] = [encode_args(self._store.policy.ending())]
        for job in jobs:
            args += (job.job_id, b"")
        reply = await self._store.call(script("cancel"), [queue_of(self._store, jobs[0])], args)
        return [_cancelled(verdict) for verdict in reply]

    async def _retry_together(self, jobs: Sequence[Stored], now_ms: int) -> list[RetryVerdict]:
        """One script call for jobs of one queue, as they were read.

        A later release's are left, since a new round would lose what this release cannot read.
        """
        later = {job.job_id for job in jobs if job.record and is_later(job.record)}
        ours = [job for job in jobs if job.job_id not in later]
        opened = iter(await self._open_rounds(ours, now_ms) if ours else ())
        return ["later" if job.job_id in later else next(opened) for job in jobs]

    async def _open_rounds(self, jobs: Sequence[Stored], now_ms: int) -> list[RetryVerdict]:
        args: list[Any] = [encode_args(self._store.policy.room())]
        for job in jobs:
            meta, options = b"", b""
            if job.record:
                record = next_round(job.record, now_ms)
                meta = encode_record(record, record_seq(job.meta))
                options = packed_options(round_options(record.options))
            args += (job.job_id, job.meta, meta, options)
        names = [queue_of(self._store, jobs[0]), keys.queues(self._store.n)]
        reply = await self._store.call(script("retry"), names, args)
        return [cast(RetryVerdict, decoding.text(verdict)) for verdict in reply]

    async def _forget_together(self, jobs: Sequence[Stored]) -> list[ForgetVerdict]:
        """One script call for ended jobs of one queue; one that was retried meanwhile is left."""
        args = [encode_args({}), *(job.job_id for job in jobs)]
        reply = await self._store.call(script("forget"), [queue_of(self._store, jobs[0])], args)
        return [_forgotten(verdict) for verdict in reply]

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


def _cancelled(reply: bytes) -> CancelVerdict:
    # A stranger's status may be any bytes; then the job is not ours to cancel.
    verdict = decoding.text(reply)
    return cast(CancelVerdict, verdict) if verdict in _CANCEL_VERDICTS else "finished"


def _forgotten(reply: bytes) -> ForgetVerdict:
    verdict = decoding.text(reply)
    return cast(ForgetVerdict, verdict) if verdict in ("forgotten", "absent") else "unfinished"
