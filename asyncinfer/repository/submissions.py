"""What an API does with jobs: submit, read, watch."""

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias, TypeVar

from msgspec import Struct

from asyncinfer.errors import InternalError, RedisUnavailable, RequestError, WritesRefused
from asyncinfer.jobs import (
    Options,
    Record,
    Status,
    encode_record,
)
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import (
    Stored,
    read_jobs,
    status_of,
    stored_of,
)
from asyncinfer.untrusted import decoding

T = TypeVar("T")

_log = LimitedLog(logging.getLogger(__name__))

MOST_JOBS: Final = 256
MOST_BYTES: Final = 1 << 20
"""What one script call takes (or one job of any size)."""

_CALLS_AT_ONCE: Final = 4


class NewJob(Struct, frozen=True):
    """A job about to be submitted; its id is made before the call, so that a retry is one."""

    job_id: str
    queue: str
    data: bytes
    record: Record
    inbox: str = ""
    """An inbox (its key) to tell when the job ends."""
    idempotency: str = ""
    fingerprint: str = ""


class Submitted(Struct, frozen=True):
    """`dup`: the Idempotency-Key stands for `job_id`, submitted with `fingerprint`."""

    verdict: Literal["ok", "exists", "dup", "full"]
    job_id: str
    fingerprint: str = ""


_Entry: TypeAlias = tuple[NewJob, asyncio.Future[Submitted]]


class _Tick:
    """The submits of one loop tick, and when their time is up."""

    def __init__(self, seconds: float) -> None:
        self.entries: list[_Entry] = []
        self.over = False
        # One timer for all: a timer each was most of what a submit cost here, and what
        # asyncio.timeout does for a task costs five times what it takes to end a future.
        self._timer = asyncio.get_running_loop().call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        self.over = True
        for _, future in self.entries:
            if not future.done():
                future.set_exception(TimeoutError())

    def open(self) -> list[_Entry]:
        return [entry for entry in self.entries if not entry[1].done()]

    def close(self) -> None:
        self._timer.cancel()


class Submissions:
    """The API's verbs. Submits of one loop tick share one script call."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tick: _Tick | None = None
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Sends what is submitted; runs as long as the API does."""
        calls = asyncio.Semaphore(_CALLS_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            while True:
                await self._arrived.wait()
                await calls.acquire()
                self._arrived.clear()
                tick, self._tick = self._tick, None
                assert tick is not None, "something arrived"
                task = group.create_task(self._send(tick))
                task.add_done_callback(lambda _: calls.release())

    async def submit(self, job: NewJob) -> Submitted:
        """Takes a job in; raises StorageFull, or RedisUnavailable naming the job."""
        future: asyncio.Future[Submitted] = asyncio.get_running_loop().create_future()
        if self._tick is None or self._tick.over:
            self._tick = _Tick(1.2 * self._store.call_seconds)
            self._arrived.set()
        self._tick.entries.append((job, future))
        try:
            return await future
        except TimeoutError as error:
            raise RedisUnavailable(
                "Redis did not answer in time; the job may or may not have been taken in.",
                retry_after_seconds=1,
                job_id=job.job_id,
            ) from error

    async def _send(self, tick: _Tick) -> None:
        for part in _parts(tick.open()):
            try:
                verdicts = await self.submit_many(part[0][0].queue, [job for job, _ in part])
            except RequestError as error:
                _refuse(part, error)
            except Exception as error:
                # No reply of Redis may end the role that all submits rely on.
                _log.unexpected("A submit failed.", error)
                _refuse(part, InternalError("Something went wrong; the server's log has the rest."))
            else:
                for (_, future), verdict in zip(part, verdicts, strict=True):
                    if not future.done():
                        future.set_result(verdict)
        tick.close()

    async def submit_many(self, queue: str, jobs: Sequence[NewJob]) -> list[Submitted]:
        """One script call: at most 256 jobs and 1 MiB (or one job), all of one queue."""
        args: list[Any] = [encode_args(self._store.policy.room())]
        for job in jobs:
            args += (
                job.job_id,
                job.data,
                encode_record(job.record),
                packed_options(script_options(job, self._store.n)),
            )
        names = [queue, keys.queues(self._store.n)]
        reply = await self._store.call(script("submit"), names, args)
        return [_submitted(job, verdict) for job, verdict in zip(jobs, reply, strict=True)]

    async def submit_all(self, jobs: Sequence[NewJob]) -> list[Submitted | RequestError]:
        """Takes in many jobs of one queue, in their order; what became of each."""
        outcomes: list[Submitted | RequestError] = []
        for part in _bounded(jobs, _size_of):
            try:
                outcomes += await self.submit_many(part[0].queue, part)
            except RequestError as error:
                outcomes += [_about(error, job.job_id) for job in part]
        return outcomes

    async def statuses(self, job_ids: Sequence[str]) -> list[Status | None]:
        """How jobs stand, without what may be large of them; None when absent."""
        if not job_ids:
            return []
        found = await self._store.command("MGET", *map(keys.status, job_ids))
        return [None if one is None else status_of(one) for one in found]

    async def read(self, job_id: str) -> Stored | None:
        """The job as it is now; None when absent."""
        return (await self.read_many([job_id]))[0]

    async def read_many(self, job_ids: Sequence[str]) -> list[Stored | None]:
        return await read_jobs(self._store, job_ids)

    async def watch(self, queue: str, inbox: str, job_ids: Sequence[str]) -> list[Stored | None]:
        """Signs `inbox` up for the jobs that have not ended; those that have come back at once.

        An absent job comes back as None, one that was signed up as `pending`.
        """
        reply = await self._store.call(script("watch"), [queue, inbox], [encode_args({}), *job_ids])
        return [_watched(job_id, one) for job_id, one in zip(job_ids, reply, strict=True)]


def _parts(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """Splits what waits into script calls: one queue each, bounded in jobs and bytes."""
    by_queue: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_queue.setdefault(entry[0].queue, []).append(entry)
    for queued in by_queue.values():
        yield from _bounded(queued, _size_of_entry)


def _bounded(entries: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Splits jobs of one queue into script calls."""
    part: list[T] = []
    size = 0
    for entry in entries:
        entry_size = size_of(entry)
        size += entry_size
        if part and (len(part) == MOST_JOBS or size > MOST_BYTES):
            yield part
            part, size = [], entry_size
        part.append(entry)
    if part:
        yield part


def _size_of(job: NewJob) -> int:
    return len(job.data)


def _size_of_entry(entry: _Entry) -> int:
    return len(entry[0].data)


def script_options(job: NewJob, n: str) -> dict[str, str | int]:
    """What `submit` must know of a job with options; empty for most jobs."""
    options = job.record.options
    found = round_options(options)
    if options.group is not None:
        found["group"] = keys.group(n, job.record.tenant, options.group)
    if job.inbox:
        found["inbox"] = job.inbox
    if job.idempotency:
        found |= {"idempotency_key": job.idempotency, "fingerprint": job.fingerprint}
    return found


def round_options(options: Options) -> dict[str, str | int]:
    """What `submit` and `retry` must know of a round's options, in the words of the scripts."""
    found: dict[str, str | int] = {}
    if options.priority != "normal":
        found["priority"] = options.priority
    if options.ttl_seconds is not None:
        found["ttl_seconds"] = options.ttl_seconds
    if options.start_within_seconds is not None:
        found["start_within_ms"] = int(options.start_within_seconds * 1000)
    if options.finish_within_seconds is not None:
        found["finish_within_ms"] = int(options.finish_within_seconds * 1000)
    if options.delay_seconds:
        found["delay_ms"] = int(options.delay_seconds * 1000)
    return found


def packed_options(options: dict[str, str | int]) -> bytes:
    return encode_args(options) if options else b""


def _refuse(entries: Sequence[_Entry], error: RequestError) -> None:
    for job, future in entries:
        if not future.done():
            future.set_exception(_about(error, job.job_id))


def _about(error: RequestError, job_id: str) -> RequestError:
    """The error of one job of a call. One refused for lack of memory, or with all writes, does
    not exist."""
    may_exist = isinstance(error, RedisUnavailable) and not isinstance(error, WritesRefused)
    named = job_id if may_exist else None
    return type(error)(error.detail, retry_after_seconds=error.retry_after_seconds, job_id=named)


def _submitted(job: NewJob, verdict: Any) -> Submitted:
    if isinstance(verdict, list):
        return Submitted("dup", decoding.text(verdict[1]), decoding.text(verdict[2]))
    return Submitted(verdict.decode(), job.job_id, job.fingerprint)


def _watched(job_id: str, reply: Any) -> Stored | None:
    if reply is None:
        return None
    if reply == b"registered":
        return Stored(job_id, "pending", None, None, None)
    return stored_of(job_id, *reply)
