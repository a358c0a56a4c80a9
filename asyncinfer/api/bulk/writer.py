"""The response lines of a bulk request, in the order of its lines."""

import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence

import msgspec
from msgspec import UNSET

from asyncinfer.api.bulk.circuit_breaker import CircuitBreaker
from asyncinfer.api.bulk.response_queue import Due, ResponseBlock, ResponseQueue
from asyncinfer.api.job_lookup import job_absent_error
from asyncinfer.api.live.inbox import Ticket
from asyncinfer.api.services import Services
from asyncinfer.api.views import WaitingForField, accepted_view, job_view
from asyncinfer.errors import RedisUnavailable, RequestError
from asyncinfer.jobs import Status
from asyncinfer.repository.stored_jobs import StoredJob
from asyncinfer.repository.submissions import with_job_id
from asyncinfer.schemas.problems import line_problem_of
from asyncinfer.schemas.responses import AcceptedJob, Job
from asyncinfer.timeouts import done_within

JobAnswers = dict[str, Job | AcceptedJob | RequestError]
"""Answers by job id."""

_encode = msgspec.json.Encoder().encode


def accepted_line(job_id: str, status: Status, waiting_for: WaitingForField) -> bytes:
    """A 202 answer as a line. It leaves out a null `waiting_for`: in 100,000 lines bytes count."""
    return _encode(accepted_view(job_id, status, waiting_for or UNSET)) + b"\n"


def problem_line(error: RequestError, line: int) -> bytes:
    """An error as a response line; `line` is the line's number in the request."""
    return _encode(line_problem_of(error, line)) + b"\n"


class ResponseWriter:
    """Writes the responses of the queue, in its order. One object for each request."""

    def __init__(self, services: Services, responses: ResponseQueue) -> None:
        self._services = services
        self._responses = responses
        self._breaker = CircuitBreaker()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yields whole lines as they become known, in order, until the queue ends. Raises nothing
        if Redis does not answer: jobs that cannot be read are answered with a 202 line."""
        while block := await self._responses.peek():
            rest = block.answers
            while rest:
                count = self._services.answer_sizes.fit(block.queue)
                part, rest = rest[:count], rest[count:]
                size = 0
                async with contextlib.aclosing(self._chunks_of(part, block)) as chunks:
                    async for text in chunks:
                        size += len(text)
                        yield text
                jobs = sum(isinstance(answer, Due) for answer in part)
                self._services.answer_sizes.note(block.queue, jobs, size)
            self._responses.pop()

    async def _chunks_of(
        self, entries: Sequence[bytes | Due], block: ResponseBlock
    ) -> AsyncGenerator[bytes, None]:
        """Yields the lines of a few responses, each once it and all before it are known. `block` is
        the one that they are from."""
        jobs = list(dict.fromkeys(entry.job_id for entry in entries if isinstance(entry, Due)))
        with self._tickets(jobs) as tickets:
            answers = await self._answers_or_watch(jobs, tickets, block)
            ready: list[bytes] = []
            for entry in entries:
                if isinstance(entry, bytes):
                    ready.append(entry)
                    continue
                if entry.job_id not in answers:
                    if ready and not tickets[entry.job_id].ended_job.done():
                        yield b"".join(ready)
                        ready.clear()
                    answers |= await self._wait_for_end(entry.job_id, tickets, answers, block.until)
                ready.append(_line_of(answers[entry.job_id], entry.line))
        yield b"".join(ready)

    @contextlib.contextmanager
    def _tickets(self, jobs: Sequence[str]) -> Iterator[dict[str, Ticket]]:
        """Holds a ticket of the inbox for each job, by id, while the block lasts."""
        with contextlib.ExitStack() as stack:
            inbox = self._services.inbox
            yield {job_id: stack.enter_context(inbox.expect(job_id)) for job_id in jobs}

    async def _answers_or_watch(
        self, jobs: Sequence[str], tickets: Mapping[str, Ticket], block: ResponseBlock
    ) -> JobAnswers:
        """The answers of jobs that have ended or are gone; the inbox will be notified of the
        others. Of all jobs as they are, if Redis does not answer, the API stops or the block's time
        is up. Jobs are watched only now, not when they are submitted, so that a result is not in
        memory before its turn."""
        if not jobs:
            return {}
        if self._services.inbox.closing.is_set() or time.monotonic() >= block.until:
            return await self._read(jobs)
        submissions, inbox = self._services.submissions, self._services.inbox.name
        try:
            states = await self._call_redis(lambda: submissions.watch(block.queue, inbox, jobs))
        except RedisUnavailable:
            return _accepted(jobs)
        answers: JobAnswers = {}
        for job_id, stored in zip(jobs, states, strict=True):
            if stored is None or stored.has_ended:
                answers[job_id] = self._view(job_id, stored)
            else:
                tickets[job_id].was_stored = True
        return answers

    async def _wait_for_end(
        self, job_id: str, tickets: Mapping[str, Ticket], answers: JobAnswers, until: float
    ) -> JobAnswers:
        """Waits for a job's end. Returns the answers that are not yet in `answers`: this job's, and
        those of others that have ended; at `until` (monotonic), or when the API stops, those of all
        jobs as they are."""
        left = max(0.0, until - time.monotonic())
        await done_within(tickets[job_id].ended_job, left)
        new: JobAnswers = {
            ticket_id: self._view(ticket_id, stored)
            for ticket_id, ticket in tickets.items()
            if ticket_id not in answers
            and ticket.ended_job.done()
            and (stored := ticket.ended_job.result())
        }
        if job_id in new:
            return new
        if tickets[job_id].ended_job.done() and not self._services.inbox.closing.is_set():
            # This job was deleted; the others may still end.
            return new | await self._read([job_id])
        return new | await self._read([other for other in tickets if other not in answers | new])

    async def _read(self, jobs: Sequence[str]) -> JobAnswers:
        """The answers of jobs as they are now; a 202 for each if Redis does not answer."""
        try:
            states = await self._call_redis(lambda: self._services.submissions.read_many(jobs))
        except RedisUnavailable:
            return _accepted(jobs)
        return {
            job_id: self._view(job_id, stored) for job_id, stored in zip(jobs, states, strict=True)
        }

    async def _call_redis(
        self, call: Callable[[], Awaitable[list[StoredJob | None]]]
    ) -> list[StoredJob | None]:
        """Returns what `call` returns. Raises RedisUnavailable, at once if Redis did not answer
        within the last second."""
        if self._breaker.is_open:
            raise RedisUnavailable("Redis did not answer a moment ago.")
        try:
            return await call()
        except RedisUnavailable:
            self._breaker.open()
            raise

    def _view(self, job_id: str, stored: StoredJob | None) -> Job | RequestError:
        """The job as an answer with its result, or the error of a job that is gone (None)."""
        if stored is None:
            return with_job_id(job_absent_error(self._services, job_id), job_id)
        waiting_for = self._services.wait_reasons.of(stored) or UNSET
        return job_view(stored, self._services.catalog.default_model, waiting_for)


def _accepted(jobs: Sequence[str]) -> JobAnswers:
    """202 answers, for when Redis cannot be read: the jobs are accepted, and the client needs their
    ids."""
    return {job_id: accepted_view(job_id, "pending", UNSET) for job_id in jobs}


def _line_of(answer: Job | AcceptedJob | RequestError, line: int) -> bytes:
    """The answer as a line; `line` is its number in the request, which only an error names."""
    if isinstance(answer, RequestError):
        return problem_line(answer, line)
    return _encode(answer) + b"\n"
