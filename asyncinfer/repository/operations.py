"""What people do: pause or resume a queue, cancel its jobs; cancel, retry or forget jobs."""

from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal, cast

from msgspec import Struct

from asyncinfer.jobs import STATUSES, encode_record, is_later, record_seq
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import StoredJob, next_round, queue_of, read_jobs_in
from asyncinfer.repository.submissions import capacity_arguments, pack_options, round_options
from asyncinfer.untrusted import decoding

_JOBS_PER_CALL: Final = 200
"""The bound of one call, so that it occupies the server for a few ms at most."""

_MAX_TRIES: Final = 5
"""Of a retry, whose jobs may change between reading and retrying them."""


CancelVerdict = Literal["cancelled", "stopping", "finished", "absent"]
_CANCEL_VERDICTS: Final = ("cancelled", "stopping", "absent")
ForgetVerdict = Literal["forgotten", "absent", "unfinished"]
RetryVerdict = Literal[
    "ok", "changed", "full", "webhooks_full", "no_input", "not_retryable", "absent", "later"
]


class CancelCounts(Struct, frozen=True):
    """The counts of a cancel of many jobs."""

    ended: int
    """Jobs that waited."""
    stopping: int
    """Jobs that run and are being stopped."""


class Operations:
    """Acts on queues and on jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def pause(self, queue: str, *, paused: bool) -> bool:
        """Pauses or resumes a queue: while it is paused, jobs are accepted and not claimed. Returns
        whether that changed anything."""
        return bool(
            await self._store.call(script("pause"), [queue], [encode_args({"is_paused": paused})])
        )

    async def cancel_queue(self, queue: str) -> int:
        """Cancels all waiting jobs of a queue, 250 a call; returns how many."""
        args = [encode_args(self._store.policy.end_arguments())]
        cancelled, left = await self._store.call(script("cancel_queue"), [queue], args)
        while left:
            count, left = await self._store.call(script("cancel_queue"), [queue], args)
            cancelled += count
        return int(cancelled)

    async def cancel(self, stored: StoredJob) -> CancelVerdict:
        """Cancels a waiting job, or has a running one stopped (`stopping`). A cancelled job gives
        `cancelled` again, another ended one `finished`."""
        return (await self._cancel_together([stored]))[0]

    async def cancel_all(self, jobs: Sequence[StoredJob]) -> CancelCounts:
        """Cancels the waiting jobs and has the running ones stopped."""
        ended = stopping = 0
        for part in self._split_into_calls(jobs):
            verdicts = await self._cancel_together(part)
            ended += verdicts.count("cancelled")
            stopping += verdicts.count("stopping")
        return CancelCounts(ended, stopping)

    async def forget(self, stored: StoredJob) -> ForgetVerdict:
        """Deletes an ended job with all its data; `unfinished` if it has not ended."""
        return (await self._forget_together([stored]))[0]

    async def forget_all(self, jobs: Sequence[StoredJob]) -> int:
        """Deletes the ended jobs; returns how many. A job that is absent by now counts as well: an
        earlier try of this call, whose reply was lost, may have deleted it."""
        forgotten = 0
        for part in self._split_into_calls(jobs):
            verdicts = await self._forget_together(part)
            forgotten += len(part) - verdicts.count("unfinished")
        return forgotten

    async def retry(self, stored: StoredJob, now_ms: int) -> RetryVerdict:
        """Starts a new round of a failed or cancelled job, as it was read.

        `changed`: the job is not as it was read. `later`: a later release wrote it.
        """
        return (await self._retry_together([stored], now_ms))[0]

    async def retry_all(self, jobs: Sequence[StoredJob], now_ms: int) -> dict[str, RetryVerdict]:
        """Starts a new round of each failed or cancelled job; returns {job id: verdict}. A job that
        changed since it was read is read again and tried again."""
        verdicts: dict[str, RetryVerdict] = {}
        for _ in range(_MAX_TRIES):
            for part in self._split_into_calls(jobs):
                replies = await self._retry_together(part, now_ms)
                verdicts |= {
                    job.job_id: verdict for job, verdict in zip(part, replies, strict=True)
                }
            tried = [job for job in jobs if verdicts[job.job_id] == "changed"]
            if not tried:
                break
            current = await read_jobs_in(self._store, [job.job_id for job in tried], STATUSES)
            current_by_id = {job.job_id: job for job in current}
            for before in tried:
                after = current_by_id.get(before.job_id)
                if after is None:
                    verdicts[before.job_id] = "absent"
                elif _is_retried(before, after, now_ms):
                    verdicts[before.job_id] = "ok"
            jobs = [job for job in current if verdicts[job.job_id] == "changed"]
        return verdicts

    async def _cancel_together(self, jobs: Sequence[StoredJob]) -> list[CancelVerdict]:
        """Cancels jobs of one queue in one script call: some tens of ms for a thousand."""
        args: list[Any] = [encode_args(self._store.policy.end_arguments())]
        for job in jobs:
            args += (job.job_id, job.idempotency_digest)
        reply = await self._store.call(script("cancel"), [queue_of(self._store, jobs[0])], args)
        return [_parse_cancel(verdict) for verdict in reply]

    async def _retry_together(self, jobs: Sequence[StoredJob], now_ms: int) -> list[RetryVerdict]:
        """Retries jobs of one queue, as they were read, in one script call.

        Leaves out jobs of a later release: a new round would lose what this release cannot read.
        """
        later = {job.job_id for job in jobs if job.record and is_later(job.record)}
        readable = [job for job in jobs if job.job_id not in later]
        verdicts = iter(await self._start_rounds(readable, now_ms) if readable else ())
        return ["later" if job.job_id in later else next(verdicts) for job in jobs]

    async def _start_rounds(self, jobs: Sequence[StoredJob], now_ms: int) -> list[RetryVerdict]:
        args: list[Any] = [encode_args(capacity_arguments(self._store, jobs))]
        for job in jobs:
            meta, options = b"", b""
            if job.record:
                record = next_round(job.record, now_ms)
                meta = encode_record(record, record_seq(job.meta))
                options = pack_options(round_options(record))
            args += (job.job_id, job.meta, meta, options)
        names = [queue_of(self._store, jobs[0]), keys.queues(self._store.queue_name)]
        reply = await self._store.call(script("retry"), names, args)
        return [cast(RetryVerdict, decoding.text(verdict)) for verdict in reply]

    async def _forget_together(self, jobs: Sequence[StoredJob]) -> list[ForgetVerdict]:
        """Deletes ended jobs of one queue in one script call, but no job retried since."""
        args: list[Any] = [encode_args({})]
        for job in jobs:
            args += (job.job_id, job.idempotency_digest, "1" if job.webhook else "")
        reply = await self._store.call(script("forget"), [queue_of(self._store, jobs[0])], args)
        return [_parse_forget(verdict) for verdict in reply]

    def _split_into_calls(self, jobs: Sequence[StoredJob]) -> Iterator[list[StoredJob]]:
        """Splits jobs into parts for one call: of one queue, and of a bounded number."""
        by_queue: dict[str, list[StoredJob]] = {}
        for job in jobs:
            by_queue.setdefault(queue_of(self._store, job), []).append(job)
        for queue_jobs in by_queue.values():
            for start in range(0, len(queue_jobs), _JOBS_PER_CALL):
                yield queue_jobs[start : start + _JOBS_PER_CALL]


def _is_retried(before: StoredJob, after: StoredJob, now_ms: int) -> bool:
    """Whether this retry has started the job's current round, by a call whose reply was lost."""
    if before.record is None or after.record is None:
        return False
    expected = next_round(before.record, now_ms)
    return (expected.round, now_ms) == (after.record.round, after.record.created_ms)


def _parse_cancel(reply: bytes) -> CancelVerdict:
    # The status of an external job may be any bytes; then it cannot be cancelled.
    verdict = decoding.text(reply)
    return cast(CancelVerdict, verdict) if verdict in _CANCEL_VERDICTS else "finished"


def _parse_forget(reply: bytes) -> ForgetVerdict:
    verdict = decoding.text(reply)
    return cast(ForgetVerdict, verdict) if verdict in ("forgotten", "absent") else "unfinished"
