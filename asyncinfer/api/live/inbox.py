"""How one API process waits for many jobs: one reader, many waiters, nothing polled."""

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Iterator
from typing import Final

from asyncinfer.errors import RedisRefused, RedisUnavailable, StorageFull, WrongKeyType
from asyncinfer.jobs import TERMINAL
from asyncinfer.processes.limited_log import LimitedLog
from asyncinfer.repository import keys
from asyncinfer.repository.inspect.log import entry_order
from asyncinfer.repository.store import Store
from asyncinfer.repository.stored_jobs import Stored, noticed, queue_of
from asyncinfer.repository.submissions import Submissions
from asyncinfer.timeouts import settled
from asyncinfer.untrusted import decoding

log = LimitedLog(logging.getLogger(__name__))

_TTL_SECONDS: Final = 60
_CHECK_SECONDS: Final = 5.0
_READ_SECONDS: Final = 5.0
_INSTANT_SECONDS: Final = 0.05
_MOST_WAITERS: Final = 20_000
_MOST_CHECKED: Final = 1000
_TURNS_TO_ANSWER: Final = 3
"""Of the event loop: one to wake who waits, one to make the answer, one in which it is sent."""

_READ_AT_ONCE: Final = 32
"""Results may be large, and one reply has to come in time."""


class Ticket:
    """One waiter's place; `wait` it at most once."""

    def __init__(self, job_id: str, submissions: Submissions) -> None:
        self.job_id = job_id
        self.ended: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()
        self.was_stored = False
        """The job was in Redis, so one that is absent now is gone; else it may be yet to come."""
        self._submissions = submissions

    async def soon(self, seconds: float) -> Stored | None:
        """The job if it ends in an instant, of at most `seconds`: too short a time for its
        client's leaving to be worth a watch, which costs more than all else of a short wait."""
        done = await settled(self.ended, min(seconds, _INSTANT_SECONDS))
        return self.ended.result() if done else None

    async def wait(self, seconds: float) -> Stored | None:
        """The ended job, or after `seconds` the job as it is; None when absent or gone."""
        if await settled(self.ended, seconds) and (stored := self.ended.result()):
            return stored
        return await self._submissions.read(self.job_id)


class Inbox:
    """The stream that tells this process of the ends it waits for.

    Notices may be lost (a restart of Redis, a stream trimmed): everything waited for is
    looked at again every few seconds, in one command.
    """

    def __init__(self, store: Store, submissions: Submissions) -> None:
        self._store = store
        self._begin()
        self._submissions = submissions
        self._blocking = store.blocking()
        self._tickets: dict[str, list[Ticket]] = {}
        self._waiters = 0
        self._read_to = b"0"
        """The id of the last entry that was read."""
        self.closing = asyncio.Event()
        """Set when nobody is to wait any longer."""

    def _begin(self) -> None:
        """Takes a new name: what was under the old one, if it was no stream, is left alone."""
        self.name = keys.inbox(self._store.n, secrets.token_hex(8))
        self._read_to = b"0"
        """The id of the last entry that was read."""

    async def run(self) -> None:
        """Reads until closed."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep())
            group.create_task(self._read())

    async def close(self) -> None:
        """Ends `run`, and answers every waiter with its job as it is now."""
        self.closing.set()
        await self._blocking.close()
        for tickets in list(self._tickets.values()):
            for ticket in tickets:
                _resolve(ticket, None)

    @contextlib.contextmanager
    def expect(self, job_id: str) -> Iterator[Ticket]:
        """A place for a job about to be submitted with this inbox, taken before the submit."""
        ticket = Ticket(job_id, self._submissions)
        if self.closing.is_set() or self._waiters >= _MOST_WAITERS:
            _resolve(ticket, None)
        self._tickets.setdefault(job_id, []).append(ticket)
        self._waiters += 1
        try:
            yield ticket
        finally:
            self._waiters -= 1
            others = self._tickets[job_id]
            others.remove(ticket)
            if not others:
                del self._tickets[job_id]

    async def wait(self, stored: Stored, seconds: float) -> Stored | None:
        """Waits for the end of a job that was just read."""
        if stored.status in TERMINAL or seconds <= 0:
            return stored
        with self.expect(stored.job_id) as ticket:
            ticket.was_stored = True
            queue = queue_of(self._store, stored)
            try:
                now = (await self._submissions.watch(queue, self.name, [stored.job_id]))[0]
            except RedisRefused as error:
                # A damaged key keeps us from being told; what is waited for is looked at anyway.
                log.warning(f"Waiting for a job of {queue!r}: {error.detail}")
                now = await self._submissions.read(stored.job_id)
            if now is None or now.status in TERMINAL:
                return now
            return await ticket.wait(seconds)

    async def _read(self) -> None:
        while not self.closing.is_set():
            try:
                entries = await self._blocking.read({self.name: self._read_to}, _READ_SECONDS)
                for _, entry_id, fields in entries:
                    await self._hear(list(noticed(fields)))
                    self._read_to = entry_id
                    # These answers go out before the next are made or asked for: all at once,
                    # their clients came back all at once, and this process and the workers took
                    # turns at rest.
                    for _ in range(_TURNS_TO_ANSWER):
                        await asyncio.sleep(0)
            except RedisUnavailable as error:
                if isinstance(error, WrongKeyType):
                    self._begin()
                if not self.closing.is_set():
                    log.warning(f"Inbox: {error.detail}")
                    await self._pause(random.uniform(0.1, 0.5))
            except Exception as error:
                # What is waited for is looked at every few seconds all the same.
                log.unexpected("What an inbox told could not be read.", error)
                await self._pause(random.uniform(0.1, 0.5))

    async def _keep(self) -> None:
        """Keeps the stream alive, and looks again at everything that is waited for."""
        while not self.closing.is_set():
            try:
                await self._stay()
                waited_for = list(self._tickets)
                for start in range(0, len(waited_for), _MOST_CHECKED):
                    await self._look(waited_for[start : start + _MOST_CHECKED])
            except RedisUnavailable as error:
                if isinstance(error, WrongKeyType):
                    self._begin()
                await self._pause(random.uniform(0.1, 0.5))
            except Exception as error:
                log.unexpected("What is waited for could not be looked at.", error)
                await self._pause(_CHECK_SECONDS)
            else:
                await self._pause(_CHECK_SECONDS * random.uniform(0.8, 1.2))

    async def _stay(self) -> None:
        """Makes the stream where it is not there; with memory full that has to wait."""
        alive = ("MAXLEN", "~", 10_000, "*", "", "alive")
        expire = ("EXPIRE", self.name, _TTL_SECONDS)
        newest = ("XREVRANGE", self.name, "+", "-", "COUNT", 1)
        read_to = self._read_to
        with contextlib.suppress(StorageFull):
            is_there, entries = await self._store.together(expire, newest)
            if not is_there:
                # In one step: who dies between the two would leave a stream for ever.
                await self._store.together(("XADD", self.name, *alive), expire)
                self._read_to = b"0"
            elif not entries or entry_order(entries[0][0]) < entry_order(read_to):
                # The stream of an older dump or of a server whose clock is behind: its next
                # entries come before the place that was read to.
                self._read_to = b"0"

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.closing.wait()

    async def _hear(self, notices: list[tuple[str, Stored | None]]) -> None:
        for job_id, stored in notices:
            if stored:
                self._answer(job_id, stored)
        await self._look([job_id for job_id, stored in notices if stored is None])

    def _answer(self, job_id: str, stored: Stored) -> None:
        for ticket in self._tickets.get(job_id, ()):
            _resolve(ticket, stored)

    async def _look(self, job_ids: list[str]) -> None:
        """Reads jobs and resolves the waiters of those that have ended."""
        wanted = [job_id for job_id in job_ids if job_id in self._tickets]
        # As it is before the look: one that is expected may be submitted during it.
        were_stored = [
            ticket for job_id in wanted for ticket in self._tickets[job_id] if ticket.was_stored
        ]
        if len(wanted) > _READ_AT_ONCE:
            wanted = await self._ended_or_absent(wanted)
        absent = set()
        for start in range(0, len(wanted), _READ_AT_ONCE):
            part = wanted[start : start + _READ_AT_ONCE]
            for job_id, stored in zip(part, await self._submissions.read_many(part), strict=True):
                if stored is None:
                    absent.add(job_id)
                elif stored.status in TERMINAL:
                    self._answer(job_id, stored)
        for ticket in were_stored:
            if ticket.job_id in absent:
                _resolve(ticket, None)

    async def _ended_or_absent(self, job_ids: list[str]) -> list[str]:
        statuses = await self._store.command("MGET", *map(keys.status, job_ids))
        return [
            job_id
            for job_id, status in zip(job_ids, statuses, strict=True)
            if status is None or decoding.text(status) in TERMINAL
        ]


def _resolve(ticket: Ticket, stored: Stored | None) -> None:
    if not ticket.ended.done():
        ticket.ended.set_result(stored)
