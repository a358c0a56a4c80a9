"""Submitting, reading and watching jobs: the calls of an API."""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Final, Literal, Protocol, TypeAlias, TypeVar

from msgspec import Struct

from asyncinfer.errors import (
    InternalError,
    RedisUnavailable,
    RequestError,
    WritesRefused,
)
from asyncinfer.jobs import Record, Status, Webhook, encode_record
from asyncinfer.monitoring.counts import Counts
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.deliveries import Target, delivered_round
from asyncinfer.repository.intake import call_submit
from asyncinfer.repository.link import BeforeSend
from asyncinfer.repository.scripts import script
from asyncinfer.repository.store import Store, encode_args
from asyncinfer.repository.stored_jobs import StoredJob, decode_status, parse_job, read_jobs
from asyncinfer.untrusted import decoding

T = TypeVar("T")

_log = LimitedLog(logging.getLogger(__name__))

MAX_JOBS_PER_CALL: Final = 256
MAX_BYTES_PER_CALL: Final = 1 << 20
"""Bounds of one script call; a call of a single job may be larger."""

_CALLS_AT_ONCE: Final = 4
_MAX_SECONDS: Final = 30.0
"""How long a submit is kept while Redis gives signs of life."""


class NewJob(Struct, frozen=True):
    """A job to submit. Its id is made before the call, so that a repeated call makes no second
    job."""

    job_id: str
    queue: str
    data: bytes
    record: Record
    inbox: str = ""
    """The key of the inbox to notify when the job ends."""
    fingerprint: str = ""
    """A digest of the request, stored with the Idempotency-Key."""


class SubmitReply(Struct, frozen=True):
    """The reply to a submit.

    `ok`: the job is stored. `exists`: it was already. `closed`: its group takes no more jobs.
    `full`: the queue is full. `kept_full`: the queue's ended jobs keep as much as they may.
    `webhooks_full`: the queue has as many webhooks to deliver as it may. `dup`: its Idempotency-Key
    belongs to the job `job_id`, which was submitted with `fingerprint`.
    """

    verdict: Literal["ok", "exists", "dup", "closed", "full", "kept_full", "webhooks_full"]
    job_id: str
    fingerprint: str = ""


_Entry: TypeAlias = tuple[NewJob, asyncio.Future[SubmitReply]]


class _GivenUp(Exception):
    """The submits of a call were given up before it was sent."""


class _Tick:
    """The submits of one tick of the event loop. All are given up once Redis has been silent for a
    while, not while it takes in others, or bytes of a large one. Each job is dropped once it is
    answered or given up: a large body must not be in memory while others are sent."""

    def __init__(self, store: Store) -> None:
        self.entries: list[_Entry] = []
        self.is_over = False
        self._unanswered: list[tuple[str, asyncio.Future[SubmitReply]]] = []
        """By id of the job, once the submits are split into parts."""
        self._parts: list[list[_Entry]] = []
        self._sent_ids: set[str] = set()
        """Jobs of which Redis may have got something."""
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._seconds = 1.2 * store.call_seconds
        self._began_at = self._loop.time()
        # One timer for all: asyncio.timeout for each submit took 16 % more of the API's CPU time.
        self._timer = self._loop.call_later(self._seconds, self._look)

    def _look(self) -> None:
        """Gives up, or looks again when Redis may have been silent for long enough."""
        now = self._loop.time()
        silent_seconds = now - max(self._store.moved_at, self._began_at)
        if silent_seconds < self._seconds and now - self._began_at < _MAX_SECONDS:
            self._timer = self._loop.call_later(self._seconds - silent_seconds, self._look)
            return
        self.is_over = True
        unsent = [(job.job_id, future) for job, future in self.entries]
        for job_id, future in (*self._unanswered, *unsent):
            if not future.done():
                was_sent = job_id in self._sent_ids
                future.set_exception(_given_up(job_id, was_sent=was_sent))
        self.entries, self._parts = [], []

    def parts(self) -> Iterator[list[_Entry]]:
        """Yields the submits in parts for one script call, until they are given up. The caller must
        refer to one part at a time. No submit may be added any more."""
        self._unanswered = [(job.job_id, future) for job, future in self.entries]
        self._parts = list(_split_by_queue(self.entries))
        self.entries = []
        while self._parts:
            yield self._parts.pop(0)

    def note_send(self, job_ids: Sequence[str]) -> None:
        """Call just before these jobs are sent. Raises _GivenUp if they may not be: their clients
        were told that nothing was stored."""
        if self.is_over and not self._sent_ids.issuperset(job_ids):
            raise _GivenUp
        self._sent_ids.update(job_ids)

    def close(self) -> None:
        """Drops the futures too, whose exceptions refer to the jobs: `run` refers to its last tick
        until the next one."""
        self._timer.cancel()
        self._unanswered = []


def _given_up(job_id: str, *, was_sent: bool) -> RedisUnavailable:
    """The error of a submit without an answer; its `job_id` is set if the job may be stored."""
    if was_sent:
        return RedisUnavailable(
            "Redis did not answer in time; the job may or may not be stored.",
            retry_after_seconds=1,
            job_id=job_id,
        )
    return RedisUnavailable(
        "Redis did not answer in time. Nothing was stored; send the request again in a moment.",
        retry_after_seconds=1,
    )


class Submissions:
    """Submits, reads and watches jobs. Submits of one event loop tick share a script call."""

    def __init__(self, store: Store) -> None:
        self.accepted = Counts()
        """By model, the jobs that Redis has stored."""
        self._store = store
        self._tick: _Tick | None = None
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Sends what `submit` collects; runs until it is cancelled."""
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

    async def submit(self, job: NewJob) -> SubmitReply:
        """Submits a job; `run` must be running. Raises StorageFull, or RedisUnavailable, whose
        `job_id` is set if the job may have been stored."""
        return await self.begin_submit(job)

    def begin_submit(self, job: NewJob) -> "asyncio.Future[SubmitReply]":
        """As `submit`; returns at once with a future of the reply or the exception."""
        future: asyncio.Future[SubmitReply] = asyncio.get_running_loop().create_future()
        if self._tick is None or self._tick.is_over:
            self._tick = _Tick(self._store)
            self._arrived.set()
        self._tick.entries.append((job, future))
        return future

    async def _send(self, tick: _Tick) -> None:
        for part in tick.parts():
            jobs = [job for job, _ in part]
            note_send = partial(tick.note_send, [job.job_id for job in jobs])
            try:
                verdicts = await self.submit_many(jobs[0].queue, jobs, note_send)
            except _GivenUp:
                break
            except RequestError as error:
                _fail(part, error)
            except Exception as error:
                # No reply of Redis may end the task that all submits rely on.
                _log.unexpected("A submit failed.", error)
                _fail(part, InternalError("Something went wrong; the server's log has the rest."))
            else:
                for (_, future), verdict in zip(part, verdicts, strict=True):
                    if not future.done():
                        future.set_result(verdict)
        tick.close()

    async def submit_many(
        self, queue: str, jobs: Sequence[NewJob], before_send: BeforeSend = lambda: None
    ) -> list[SubmitReply]:
        """Submits jobs of one queue in one script call: at most 256 jobs and 1 MiB, or a single job
        of any size. Returns a reply for each job, in order. Raises as `Store.call` does."""
        args: list[Any] = [encode_args(capacity_arguments(self._store, jobs))]
        for job in jobs:
            args += (
                job.job_id,
                job.data,
                encode_record(job.record),
                pack_options(script_options(job, self._store.queue_name)),
            )
        reply = await call_submit(self._store, queue, args, before_send)
        self.accepted.add((jobs[0].record.model,), reply.count(b"ok"))
        return [_parse_submit(job, verdict) for job, verdict in zip(jobs, reply, strict=True)]

    async def submit_all(self, jobs: Sequence[NewJob]) -> list[SubmitReply | RequestError]:
        """Submits any number of jobs of one queue, in order. Returns for each its reply, or the
        error of its call instead of raising it."""
        outcomes: list[SubmitReply | RequestError] = []
        for part in _split_by_size(jobs, _size_of):
            try:
                outcomes += await self.submit_many(part[0].queue, part)
            except RequestError as error:
                outcomes += [_error_of(error, job.job_id) for job in part]
        return outcomes

    async def statuses(self, job_ids: Sequence[str]) -> list[Status | None]:
        """The status of each job, read without anything large; None for an absent job."""
        if not job_ids:
            return []
        reply = await self._store.command("MGET", *map(keys.status, job_ids))
        return [None if status is None else decode_status(status) for status in reply]

    async def read(self, job_id: str) -> StoredJob | None:
        """Reads a job; None if it is absent or its record is unreadable."""
        return (await self.read_many([job_id]))[0]

    async def read_many(self, job_ids: Sequence[str]) -> list[StoredJob | None]:
        return await read_jobs(self._store, job_ids)

    async def watch(self, queue: str, inbox: str, job_ids: Sequence[str]) -> list[StoredJob | None]:
        """Registers `inbox` to be notified of the end of jobs of one queue.

        Returns each job that has ended already, a job with status `pending` for each that was
        registered, and None for each absent job.
        """
        reply = await self._store.call(script("watch"), [queue, inbox], [encode_args({}), *job_ids])
        return [_parse_watch(job_id, parts) for job_id, parts in zip(job_ids, reply, strict=True)]

    async def keep_inbox(self, inbox: str, ttl_seconds: int) -> bytes:
        """Makes an inbox if it is absent, also with full memory, and lets it expire after
        `ttl_seconds`; returns the id of its newest entry."""
        args = [encode_args({"ttl_seconds": ttl_seconds})]
        return bytes(await self._store.call(script("keep_inbox"), [inbox], args))


def _split_by_queue(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """Splits submits into parts for one script call: of one queue, bounded in jobs and bytes."""
    by_queue: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_queue.setdefault(entry[0].queue, []).append(entry)
    for queued in by_queue.values():
        yield from _split_by_size(queued, _size_of_entry)


def _split_by_size(entries: Sequence[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Splits jobs of one queue into parts for one script call each."""
    part: list[T] = []
    size = 0
    for entry in entries:
        entry_size = size_of(entry)
        size += entry_size
        if part and (len(part) == MAX_JOBS_PER_CALL or size > MAX_BYTES_PER_CALL):
            yield part
            part, size = [], entry_size
        part.append(entry)
    if part:
        yield part


def _size_of(job: NewJob) -> int:
    return len(job.data)


def _size_of_entry(entry: _Entry) -> int:
    return len(entry[0].data)


class _HasRecord(Protocol):
    """A new job or a stored one."""

    @property
    def record(self) -> Record | None: ...


def capacity_arguments(store: Store, jobs: Iterable[_HasRecord]) -> dict[str, int]:
    """What a script needs to know to take these jobs in; more if one of them has a webhook."""
    arguments = store.policy.capacity_arguments()
    for job in jobs:
        if job.record and job.record.options.webhook:
            return arguments | store.policy.webhook_arguments()
    return arguments


def script_options(job: NewJob, n: str) -> dict[str, str | int]:
    """The options of a job in the words of `submit`; empty for most jobs."""
    options = job.record.options
    fields = round_options(job.record)
    if options.group is not None:
        fields["group"] = keys.group(n, job.record.tenant, options.group)
    if job.inbox:
        fields["inbox"] = job.inbox
    if job.record.idempotency_digest:
        fields["fingerprint"] = job.fingerprint
    return fields


def round_options(record: Record) -> dict[str, str | int]:
    """The options of a round in the words of `submit` and `retry`; empty for most jobs."""
    options = record.options
    fields: dict[str, str | int] = {}
    if options.priority != "normal":
        fields["priority"] = options.priority
    if options.ttl_seconds is not None:
        fields["ttl_seconds"] = options.ttl_seconds
    if options.start_within_seconds is not None:
        fields["start_within_ms"] = int(options.start_within_seconds * 1000)
    if options.finish_within_seconds is not None:
        fields["finish_within_ms"] = int(options.finish_within_seconds * 1000)
    if options.delay_seconds:
        fields["delay_ms"] = int(options.delay_seconds * 1000)
    if record.idempotency_digest:
        fields["idempotency_key"] = record.idempotency_digest
    if options.webhook is not None:
        fields |= _webhook_options(options.webhook, record)
    return fields


def _webhook_options(webhook: Webhook, record: Record) -> dict[str, str | int]:
    target = Target(webhook.url, record.tenant, record.model, webhook.metadata)
    fields: dict[str, str | int] = {
        "webhook_events": webhook.event_bits,
        "webhook_bytes": target.reserved_bytes,
        "webhook_target": target.text,
    }
    if record.round != 1:
        fields["webhook_round"] = delivered_round(record.round)
    return fields


def pack_options(fields: dict[str, str | int]) -> bytes:
    return encode_args(fields) if fields else b""


def _fail(entries: Sequence[_Entry], error: RequestError) -> None:
    for job, future in entries:
        if not future.done():
            future.set_exception(_error_of(error, job.job_id))


def _error_of(error: RequestError, job_id: str) -> RequestError:
    """The error of a call as that of one of its jobs. It names the job if the job may be stored:
    not if Redis has no memory left or refuses all writes, or if nothing was sent to it."""
    if not isinstance(error, RedisUnavailable) or isinstance(error, WritesRefused):
        return with_job_id(error, None)
    if error.may_have_run:
        return with_job_id(error, job_id)
    return type(error)(
        f"{error.detail} Nothing was stored.", retry_after_seconds=error.retry_after_seconds
    )


def with_job_id(error: RequestError, job_id: str | None) -> RequestError:
    """A copy of the error with the id of its job, without its faults."""
    return type(error)(
        error.detail,
        retry_after_seconds=error.retry_after_seconds,
        job_id=job_id,
        headers=error.headers,
    )


def _parse_submit(job: NewJob, verdict: Any) -> SubmitReply:
    if isinstance(verdict, list):
        return SubmitReply("dup", decoding.text(verdict[1]), decoding.text(verdict[2]))
    return SubmitReply(verdict.decode(), job.job_id, job.fingerprint)


def _parse_watch(job_id: str, reply: Any) -> StoredJob | None:
    if reply is None:
        return None
    if reply == b"registered":
        return StoredJob(job_id, "pending", None, None, None)
    return parse_job(job_id, *reply)
