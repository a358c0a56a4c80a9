"""Waiting for the ends of many jobs in one API process, with one reader of one stream."""

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Iterator
from typing import Final

from asyncinfer.api.answer_sizes import AnswerSizes
from asyncinfer.errors import RedisRefused, RedisUnavailable, WritesRefused, WrongKeyType
from asyncinfer.jobs import TERMINAL
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import entry_order
from asyncinfer.repository.redis_errors import log_refused
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import StoredJob, parse_inbox_entry, queue_of
from asyncinfer.repository.submissions import Submissions
from asyncinfer.timeouts import done_within, pause_before_retry, set_within

_log = LimitedLog(logging.getLogger(__name__))

_TTL_SECONDS: Final = 60
_CHECK_SECONDS: Final = 5.0
_READ_SECONDS: Final = 5.0
_INSTANT_SECONDS: Final = 0.05
_MAX_WAITERS: Final = 20_000
_CHECKED_AT_ONCE: Final = 1000
_TURNS_TO_ANSWER: Final = 3
"""Turns of the event loop: one wakes the waiter, one makes the answer, one sends it."""

_READ_WITHOUT_LOOKING: Final = 32
"""For more jobs it looks first which have ended."""
_ANY_QUEUE: Final = ""


class Ticket:
    """One waiter's registration for the end of a job; `wait` may be called at most once.
    `ended_job` is resolved with the ended job, or with None if the job must be read instead."""

    def __init__(self, job_id: str, submissions: Submissions) -> None:
        self.job_id = job_id
        self.ended_job: asyncio.Future[StoredJob | None] = (
            asyncio.get_running_loop().create_future()
        )
        self.was_stored = False
        """Whether the job is known to have been in Redis: if it is absent later, it was deleted.
        Otherwise it may not have been submitted yet."""
        self._submissions = submissions

    async def wait_briefly(self, seconds: float) -> StoredJob | None:
        """The job if it ends within 50 ms (or `seconds`, if fewer), else None; `wait` may follow.
        The time is too short to watch for the client's disconnect, which costs more than the rest
        of the wait."""
        done = await done_within(self.ended_job, min(seconds, _INSTANT_SECONDS))
        return self.ended_job.result() if done else None

    async def wait(self, seconds: float) -> StoredJob | None:
        """The ended job, or after `seconds` or when the API stops the job as it is; None if it does
        not exist. Raises RedisUnavailable if it must be read and cannot be."""
        if await done_within(self.ended_job, seconds) and (stored := self.ended_job.result()):
            return stored
        return await self._submissions.read(self.job_id)


class Inbox:
    """Waits for the ends of jobs, which scripts report in this process's own stream. One object for
    each API process.

    Notices may be lost (Redis restarts, the stream is trimmed), so every job with a waiter is read
    again every few seconds, in one command.
    """

    def __init__(self, store: Store, submissions: Submissions) -> None:
        self._store = store
        self._use_new_name()
        self._submissions = submissions
        self._blocking = store.blocking_connection()
        self._tickets: dict[str, list[Ticket]] = {}
        self.waiters = 0
        """How many requests wait for a job now."""
        self._sizes = AnswerSizes()
        """Of the jobs that it read."""
        self._read_to = b"0"
        """The id of the last entry that was read."""
        self.closing = asyncio.Event()
        """Set when the API stops: no waiter may wait any longer."""

    def _use_new_name(self) -> None:
        """Chooses a new name, whose stream is read from its start; a key under the old one that is
        not a stream is left alone."""
        self.name = keys.inbox(self._store.queue_name, secrets.token_hex(8))
        self._read_to = b"0"

    async def run(self) -> None:
        """Reads until closed; logs errors of Redis and goes on."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._maintain())
            group.create_task(self._read())

    async def close(self) -> None:
        """Ends `run`, and wakes every waiter, which then reads its job as it is now. Later waits
        end at once."""
        self.closing.set()
        await self._blocking.close()
        for tickets in list(self._tickets.values()):
            for ticket in tickets:
                _resolve(ticket, None)

    @contextlib.contextmanager
    def expect(self, job_id: str) -> Iterator[Ticket]:
        """Yields a ticket for a job, valid within the block; enter it before the job is submitted
        with this inbox. It is resolved with None at once if the API stops or has too many
        waiters."""
        ticket = Ticket(job_id, self._submissions)
        if self.closing.is_set() or self.waiters >= _MAX_WAITERS:
            _resolve(ticket, None)
        self._tickets.setdefault(job_id, []).append(ticket)
        self.waiters += 1
        try:
            yield ticket
        finally:
            self.waiters -= 1
            others = self._tickets[job_id]
            others.remove(ticket)
            if not others:
                del self._tickets[job_id]

    async def wait(self, stored: StoredJob, seconds: float) -> StoredJob | None:
        """The ended job, or after `seconds` or when the API stops the job as it is; None if it does
        not exist. `stored` is the job as it was just read, and returned as it is if no wait is
        needed. Raises RedisUnavailable."""
        if stored.has_ended or seconds <= 0:
            return stored
        with self.expect(stored.job_id) as ticket:
            ticket.was_stored = True
            queue = queue_of(self._store, stored)
            try:
                now = (await self._submissions.watch(queue, self.name, [stored.job_id]))[0]
            except (RedisRefused, WritesRefused) as error:
                # No notice will come, but the periodic check still finds the end.
                if isinstance(error, RedisRefused):
                    _log.warning(f"Waiting for a job of {queue!r}: {error.detail}")
                now = await self._submissions.read(stored.job_id)
            if now is None or now.has_ended:
                return now
            return await ticket.wait(seconds)

    async def _read(self) -> None:
        """Reads notices and resolves their waiters until closed."""
        while not self.closing.is_set():
            try:
                entries = await self._blocking.read({self.name: self._read_to}, _READ_SECONDS)
                for _, entry_id, fields in entries:
                    await self._handle_notices(list(parse_inbox_entry(fields)))
                    self._read_to = entry_id
                    # Send these answers before reading more notices. When all answers went out at
                    # once, all clients came back at once, and this process and the workers were
                    # idle in turns.
                    for _ in range(_TURNS_TO_ANSWER):
                        await asyncio.sleep(0)
            except RedisUnavailable as error:
                if isinstance(error, WrongKeyType):
                    self._use_new_name()
                if not self.closing.is_set():
                    log_refused(_log, "Inbox", error)
                    await pause_before_retry(self.closing)
            except Exception as error:
                # The periodic check finds the ends that these notices reported.
                _log.unexpected("Notices of ended jobs could not be read.", error)
                await pause_before_retry(self.closing)

    async def _maintain(self) -> None:
        """Keeps the stream alive, and reads again every job that has a waiter, every 4 to 6 s until
        closed."""
        while not self.closing.is_set():
            try:
                await self._ensure_stream()
                job_ids = list(self._tickets)
                for start in range(0, len(job_ids), _CHECKED_AT_ONCE):
                    await self._recheck(job_ids[start : start + _CHECKED_AT_ONCE])
            except RedisUnavailable as error:
                if isinstance(error, WrongKeyType):
                    self._use_new_name()
                await pause_before_retry(self.closing)
            except Exception as error:
                _log.unexpected("Jobs with waiting clients could not be checked.", error)
                await set_within(self.closing, _CHECK_SECONDS)
            else:
                await set_within(self.closing, _CHECK_SECONDS * random.uniform(0.8, 1.2))

    async def _ensure_stream(self) -> None:
        """Renews the stream's expiry, and creates a missing stream. Sets the reader back to the
        start of a stream whose entries are older than what was read: it came from an older dump, or
        the server's clock is behind. Raises RedisUnavailable."""
        read_to = self._read_to
        newest = await self._submissions.keep_inbox(self.name, _TTL_SECONDS)
        if entry_order(newest) < entry_order(read_to):
            self._read_to = b"0"

    async def _handle_notices(self, notices: list[tuple[str, StoredJob | None]]) -> None:
        """Resolves the waiters of these jobs; a job that its notice does not include (None) is
        read. Raises RedisUnavailable."""
        for job_id, stored in notices:
            if stored:
                self._resolve_waiters(job_id, stored)
        await self._recheck([job_id for job_id, stored in notices if stored is None])

    def _resolve_waiters(self, job_id: str, stored: StoredJob) -> None:
        """Resolves all waiters of a job that has ended."""
        for ticket in self._tickets.get(job_id, ()):
            _resolve(ticket, stored)

    async def _recheck(self, job_ids: list[str]) -> None:
        """Reads those of the jobs that have waiters, and resolves the waiters of jobs that have
        ended. Waiters of absent jobs are resolved with None, but only those whose job is known to
        have been stored. Raises RedisUnavailable."""
        wanted = [job_id for job_id in job_ids if job_id in self._tickets]
        # Taken before the jobs are read: a job that is only expected may be submitted meanwhile.
        were_stored = [
            ticket for job_id in wanted for ticket in self._tickets[job_id] if ticket.was_stored
        ]
        if len(wanted) > _READ_WITHOUT_LOOKING:
            wanted = await self._ended_or_absent(wanted)
        absent = set()
        while wanted:
            count = self._sizes.fit(_ANY_QUEUE)
            part, wanted = wanted[:count], wanted[count:]
            states = await self._submissions.read_many(part)
            size = sum(len(stored.result or b"") for stored in states if stored)
            self._sizes.note(_ANY_QUEUE, len(part), size)
            for job_id, stored in zip(part, states, strict=True):
                if stored is None:
                    absent.add(job_id)
                elif stored.has_ended:
                    self._resolve_waiters(job_id, stored)
        for ticket in were_stored:
            if ticket.job_id in absent:
                _resolve(ticket, None)

    async def _ended_or_absent(self, job_ids: list[str]) -> list[str]:
        """Those of the jobs that have ended or do not exist, by their status alone."""
        statuses = await self._submissions.statuses(job_ids)
        return [
            job_id
            for job_id, status in zip(job_ids, statuses, strict=True)
            if status is None or status in TERMINAL
        ]


def _resolve(ticket: Ticket, stored: StoredJob | None) -> None:
    """Wakes the ticket's waiter with the ended job, or with None to let it read the job; does
    nothing if that was done before."""
    if not ticket.ended_job.done():
        ticket.ended_job.set_result(stored)
