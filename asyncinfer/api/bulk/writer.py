"""What is answered to each line of a request of many, when it is its turn."""

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec
from msgspec import UNSET

from asyncinfer.api.bulk.response_queue import Block, Due, Owed
from asyncinfer.api.job_lookup import absent
from asyncinfer.api.live.inbox import Ticket
from asyncinfer.api.services import Services
from asyncinfer.api.views import Waiting, accepted_view, ended, job_view
from asyncinfer.errors import RedisUnavailable, RequestError
from asyncinfer.jobs import Status
from asyncinfer.repository.stored_jobs import Stored
from asyncinfer.schemas.problems import line_problem_of
from asyncinfer.schemas.responses import Accepted, Job
from asyncinfer.timeouts import settled

_AWAY_SECONDS: Final = 1.0

Known = dict[str, Job | Accepted | RequestError]
"""What there is to say of jobs, by their ids."""

_encode = msgspec.json.Encoder().encode


def accepted_line(job_id: str, status: Status, waiting_for: Waiting) -> bytes:
    """Without a member that says that nothing is wrong: of 100,000 lines each byte counts."""
    return _encode(accepted_view(job_id, status, waiting_for or UNSET)) + b"\n"


def problem_line(error: RequestError, line: int) -> bytes:
    return _encode(line_problem_of(error, line)) + b"\n"


def about(error: RequestError, job_id: str) -> RequestError:
    """The same error, of a job."""
    return type(error)(
        error.detail,
        retry_after_seconds=error.retry_after_seconds,
        job_id=job_id,
        headers=error.headers,
    )


class Answers:
    """Writes what is owed, in its order."""

    def __init__(self, services: Services, owed: Owed) -> None:
        self._services = services
        self._owed = owed
        self._away_until = 0.0

    async def texts(self) -> AsyncGenerator[bytes, None]:
        while block := await self._owed.next():
            rest = block.answers
            while rest:
                count = self._services.answer_sizes.fit(block.queue)
                part, rest = rest[:count], rest[count:]
                size = 0
                async with contextlib.aclosing(self._part(part, block)) as texts:
                    async for text in texts:
                        size += len(text)
                        yield text
                jobs = sum(isinstance(answer, Due) for answer in part)
                self._services.answer_sizes.note(block.queue, jobs, size)
            self._owed.settle()

    async def _part(
        self, answers: Sequence[bytes | Due], block: Block
    ) -> AsyncGenerator[bytes, None]:
        """The lines of a few answers, each as soon as it and those before it are known."""
        jobs = list(dict.fromkeys(one.job_id for one in answers if isinstance(one, Due)))
        with self._tickets(jobs) as tickets:
            known = await self._look(jobs, tickets, block)
            ready: list[bytes] = []
            for one in answers:
                if isinstance(one, bytes):
                    ready.append(one)
                    continue
                if one.job_id not in known:
                    if ready and not tickets[one.job_id].ended.done():
                        yield b"".join(ready)
                        ready.clear()
                    known |= await self._end_of(one.job_id, tickets, known, block.until)
                ready.append(_line_of(known[one.job_id], one.line))
        yield b"".join(ready)

    @contextlib.contextmanager
    def _tickets(self, jobs: Sequence[str]) -> Iterator[dict[str, Ticket]]:
        with contextlib.ExitStack() as stack:
            inbox = self._services.inbox
            yield {job_id: stack.enter_context(inbox.expect(job_id)) for job_id in jobs}

    async def _look(
        self, jobs: Sequence[str], tickets: Mapping[str, Ticket], block: Block
    ) -> Known:
        """Those that have ended; of the others the inbox will hear. They are signed up only now,
        not as they are submitted: a result is in memory when it is its turn, no sooner."""
        if not jobs:
            return {}
        if self._services.inbox.closing.is_set() or time.monotonic() >= block.until:
            return await self._read(jobs)
        submissions, inbox = self._services.submissions, self._services.inbox.name
        try:
            states = await self._asked(lambda: submissions.watch(block.queue, inbox, jobs))
        except RedisUnavailable:
            return _accepted(jobs)
        known: Known = {}
        for job_id, stored in zip(jobs, states, strict=True):
            if stored is None or ended(stored):
                known[job_id] = self._view(job_id, stored)
            else:
                tickets[job_id].was_stored = True
        return known

    async def _end_of(
        self, job_id: str, tickets: Mapping[str, Ticket], known: Known, until: float
    ) -> Known:
        """What is known once a job has ended; when time is out, of all jobs as they are."""
        left = max(0.0, until - time.monotonic())
        await settled(tickets[job_id].ended, left)
        heard: Known = {
            one: self._view(one, stored)
            for one, ticket in tickets.items()
            if one not in known and ticket.ended.done() and (stored := ticket.ended.result())
        }
        if job_id in heard:
            return heard
        if tickets[job_id].ended.done() and not self._services.inbox.closing.is_set():
            # This one is gone; the others may end yet.
            return heard | await self._read([job_id])
        return heard | await self._read([one for one in tickets if one not in known | heard])

    async def _read(self, jobs: Sequence[str]) -> Known:
        try:
            found = await self._asked(lambda: self._services.submissions.read_many(jobs))
        except RedisUnavailable:
            return _accepted(jobs)
        return {
            job_id: self._view(job_id, stored) for job_id, stored in zip(jobs, found, strict=True)
        }

    async def _asked(
        self, ask: Callable[[], Awaitable[list[Stored | None]]]
    ) -> list[Stored | None]:
        """Asks Redis, unless it did not answer a moment ago: every call would take as long."""
        if time.monotonic() < self._away_until:
            raise RedisUnavailable("Redis did not answer a moment ago.")
        try:
            return await ask()
        except RedisUnavailable:
            self._away_until = time.monotonic() + _AWAY_SECONDS
            raise

    def _view(self, job_id: str, stored: Stored | None) -> Job | RequestError:
        if stored is None:
            return about(absent(self._services, job_id), job_id)
        waiting_for = self._services.reasons.of(stored) or UNSET
        return job_view(stored, self._services.catalog.default_model, waiting_for)


def _accepted(jobs: Sequence[str]) -> Known:
    """The jobs are accepted whatever becomes of the wait, and their client must know them."""
    return {job_id: accepted_view(job_id, "pending", UNSET) for job_id in jobs}


def _line_of(answer: Job | Accepted | RequestError, line: int) -> bytes:
    if isinstance(answer, RequestError):
        return problem_line(answer, line)
    return _encode(answer) + b"\n"
