"""POST /predict with one request a line: many jobs, taken in while their answers are sent."""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeVar

import anyio
import anyio.lowlevel
import msgspec
from starlette.types import Message

from asyncinfer.api.bulk.response_queue import Block, Due, Owed
from asyncinfer.api.bulk.writer import Answers, about, accepted_line, problem_line
from asyncinfer.api.catalog import Served
from asyncinfer.api.http.body import NDJSON, check_lines
from asyncinfer.api.http.messages import ClientGone, ClientTooSlow, Request, Stream
from asyncinfer.api.http.ndjson import Line, Lines
from asyncinfer.api.inputs.new_job import explained, new_job, refusal_of
from asyncinfer.api.inputs.request_input import is_long, read_line, read_long_line
from asyncinfer.api.job_lookup import absent
from asyncinfer.api.live.wait import preferred_wait, until_gone
from asyncinfer.api.services import Services
from asyncinfer.errors import (
    BodyTooLarge,
    InvalidHeader,
    RedisUnavailable,
    RequestError,
    RequestTimeout,
    ServerStopping,
    TooManyRefusedLines,
    WritesRefused,
)
from asyncinfer.jobs import Status, created_ms
from asyncinfer.repository.submissions import MOST_BYTES, MOST_JOBS, NewJob, Submitted
from asyncinfer.schemas.requests import AskedOptions

T = TypeVar("T")

_AT_A_STRETCH_SECONDS: Final = 0.01
"""How long lines are checked before other clients have their turn."""

_AWAY_SECONDS: Final = 1.0
"""After Redis was silent, lines are refused at once for this long: each call takes as long."""

_MOST_REFUSED: Final = 1000
_REFUSED_FOR_ONE: Final = 10
"""A refused line may be two bytes long, and costs as much as one that is taken in: half a million
of them kept a server busy for 15 s, with 116 MB of answers. So a request ends once it has so many,
and so many times more than lines that are sound."""

Numbered = tuple[int, NewJob | RequestError]


class _KeyRevoked(Exception):
    """No more lines are taken, since the client's key was revoked."""


async def predict_lines(services: Services, request: Request[AskedOptions]) -> Stream:
    """Raises what is to be said of the request as a whole; what is wrong with a line is its
    answer."""
    check_lines(request)
    if request.header(b"idempotency-key") is not None:
        raise InvalidHeader(
            "Idempotency-Key does not go with one request a line: give each line a member "
            "`idempotency_key` of its own."
        )
    wait_seconds = preferred_wait(request)
    await services.catalog.find(request.path("model"))
    request.keep_body_open()
    owed = Owed()
    reader = Reader(services, request, owed, wait_seconds)
    await reader.begin()
    applied = () if wait_seconds is None else ((b"preference-applied", b"wait=%d" % wait_seconds),)
    return Stream(
        Answers(services, owed).texts(),
        NDJSON.encode(),
        headers=applied,
        reading=reader.run,
        last_words=reader.refuse,
    )


class Reader:
    """Reads lines, submits them as they come, and leaves what became of each in `owed`."""

    def __init__(
        self,
        services: Services,
        request: Request[AskedOptions],
        owed: Owed,
        wait_seconds: int | None,
    ) -> None:
        self._services = services
        self._request = request
        self._owed = owed
        self._wait_seconds = wait_seconds
        self._silence_seconds = services.config.body_timeout_seconds
        self._first: Message | None = None
        self._heard_at = time.monotonic()
        self._last_line = 0
        self._taken_lines = self._refused_lines = 0
        self._away_until = 0.0
        self._pause = anyio.CancelScope()
        """Around what may be broken off when the API stops: a submit may not."""
        self._key_is_revoked = False
        self._ended = anyio.Event()
        """No line is taken any more."""

    async def begin(self) -> None:
        """A client that waits for `100 Continue` is sent it when it is read from; once an answer
        has begun that is too late."""
        if b"expect" in self._request.headers:
            self._first = await self._request.receive()

    async def run(self) -> None:
        """Returns when the client has left."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._stop_with_the_api)
            try:
                await self._read()
            except ClientGone:
                return
            except _KeyRevoked:
                pass
            except RequestError as error:
                self._add([problem_line(error, self._last_line + 1)], "")
            finally:
                self._ended.set()
                group.cancel_scope.cancel()
        self._owed.end()
        await until_gone(self._request)

    async def refuse(self, error: RequestError) -> bytes:
        """Takes no more lines, since the client's key was revoked: the answer's last line. The
        submit under way is not broken off."""
        self._key_is_revoked = True
        self._pause.cancel()
        await self._ended.wait()
        told = type(error)(
            f"{error.detail} Lines before this one were taken in, unless they are faulty; of those "
            "without an answer `GET /jobs` with another key tells."
        )
        return problem_line(told, self._last_line + 1)

    async def _stop_with_the_api(self) -> None:
        await self._services.inbox.closing.wait()
        self._pause.cancel()

    async def _read(self) -> None:
        lines = Lines(self._services.config.max_json_bytes)
        more = True
        while more:
            message = await self._received()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            await self._take(lines.cut(message.get("body", b"")))
        await self._take(lines.rest())

    # --- waiting for the client ------------------------------------------------------------

    async def _received(self) -> Message:
        """What the client sends next. While answers are owed to it, it may wait for those."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            silent_since = max(self._heard_at, self._owed.settled_at)
            left = silent_since + self._silence_seconds - time.monotonic()
            if self._owed:
                left = self._silence_seconds
            elif left <= 0:
                raise RequestTimeout(
                    f"Nothing came for {self._silence_seconds:g} s, and the body had not ended. "
                    "Send this line and those after it again."
                )
            if message := await self._unless_stopped(self._request.receive, left):
                self._heard_at = time.monotonic()
                return message

    async def _room(self) -> None:
        """Returns when another answer may be owed: a client has to take some, at last."""
        longest = self._silence_seconds + (self._wait_seconds or 0)
        if await self._unless_stopped(self._is_room, longest) is None:
            raise ClientTooSlow(f"the client took nothing of its answer for {longest:g} s")

    async def _is_room(self) -> bool:
        await self._owed.room()
        return True

    async def _unless_stopped(self, call: Callable[[], Awaitable[T]], seconds: float) -> T | None:
        """What a call comes to within so many seconds; raises ServerStopping."""
        if not (self._key_is_revoked or self._services.inbox.closing.is_set()):
            with anyio.move_on_after(seconds) as self._pause:
                return await call()
        if self._key_is_revoked:
            raise _KeyRevoked
        if self._services.inbox.closing.is_set():
            raise ServerStopping(
                "The server stops, and has not read this line nor those after it. Send them again.",
                retry_after_seconds=1,
            )
        return None

    # --- from lines to answers -------------------------------------------------------------

    async def _take(self, lines: Iterator[Line]) -> None:
        while True:
            await self._room()
            served = await self._served()
            if not (batch := await self._batch(lines, served)):
                return
            queue = served.queue if isinstance(served, Served) else ""
            self._add(await self._answers(batch), queue)
            self._check_refused()
            await anyio.lowlevel.checkpoint()

    def _check_refused(self) -> None:
        refused, taken = self._refused_lines, self._taken_lines
        if refused > max(_MOST_REFUSED, _REFUSED_FOR_ONE * taken):
            raise TooManyRefusedLines(
                f"{refused} lines were refused and {taken} taken, so this line and those after it "
                "were not read. Mend what the answers say, and send the rest again."
            )

    async def _served(self) -> Served | RequestError:
        """The model as it is now: a request may go on for longer than a version is served."""
        try:
            return await self._services.catalog.find(self._request.path("model"))
        except RequestError as error:
            return error

    async def _batch(self, lines: Iterator[Line], served: Served | RequestError) -> list[Numbered]:
        """As many lines as one script call takes, checked."""
        batch: list[Numbered] = []
        size = 0
        until = time.perf_counter() + _AT_A_STRETCH_SECONDS
        for line in lines:
            self._last_line = line.number
            try:
                batch.append((line.number, await self._job_of(line, served)))
                self._taken_lines += 1
            except RequestError as error:
                batch.append((line.number, error))
                self._refused_lines += 1
            size += len(line.text or b"")
            if len(batch) == MOST_JOBS or size > MOST_BYTES or time.perf_counter() > until:
                break
        return batch

    async def _job_of(self, line: Line, served: Served | RequestError) -> NewJob:
        if line.text is None:
            raise BodyTooLarge(
                f"A line may have {self._services.config.max_json_bytes} bytes. Send fewer rows "
                "per line, or raise MAX_JSON."
            )
        if isinstance(served, RequestError):
            raise served
        query = self._request.query
        if is_long(line.text):
            limiter = self._services.long_reads
            asked, key = await read_long_line(line.text, query, served, limiter)
        else:
            asked, key = read_line(line.text, query, served)
        return new_job(self._request.tenant, served.queue, asked, key)

    async def _answers(self, batch: Sequence[Numbered]) -> list[bytes | Due]:
        jobs = [one for _, one in batch if isinstance(one, NewJob)]
        outcomes = await self._submit(jobs)
        statuses = await self._earlier(outcomes)
        left = iter(zip(jobs, outcomes, strict=True))
        answers: list[bytes | Due] = []
        for number, one in batch:
            if isinstance(one, RequestError):
                answers.append(problem_line(one, number))
                continue
            found = self._outcome(*next(left), statuses)
            if isinstance(found, RequestError):
                answers.append(problem_line(found, number))
            elif self._wait_seconds is None:
                answers.append(self._accepted(one, *found))
            else:
                answers.append(Due(number, found[0]))
        return answers

    def _accepted(self, job: NewJob, job_id: str, status: Status) -> bytes:
        record = job.record
        if job_id != job.job_id and (made_ms := created_ms(job_id)) is not None:
            # An earlier one with the same options, whose delay began as it was made.
            record = msgspec.structs.replace(record, created_ms=made_ms)
        return accepted_line(job_id, status, self._services.reasons.of_record(record, status))

    async def _submit(self, jobs: Sequence[NewJob]) -> Sequence[Submitted | RequestError]:
        if time.monotonic() < self._away_until:
            error = RedisUnavailable(
                "Redis did not answer a moment ago, so this line was not sent to it. Send it "
                "again in a moment.",
                retry_after_seconds=1,
            )
            return [error] * len(jobs)
        outcomes = await self._services.submissions.submit_all(jobs)
        if any(
            isinstance(one, RedisUnavailable) and not isinstance(one, WritesRefused)
            for one in outcomes
        ):
            self._away_until = time.monotonic() + _AWAY_SECONDS
        return outcomes

    async def _earlier(
        self, outcomes: Sequence[Submitted | RequestError]
    ) -> dict[str, Status | RequestError]:
        """How the jobs stand that were there before; nobody asks where they are waited for."""
        ids = [one.job_id for one in outcomes if isinstance(one, Submitted) and _is_dup(one)]
        if not ids or self._wait_seconds is not None:
            return {}
        try:
            statuses = await self._services.submissions.statuses(ids)
        except RedisUnavailable as error:
            return {job_id: about(error, job_id) for job_id in ids}
        return {
            job_id: status or about(absent(self._services, job_id), job_id)
            for job_id, status in zip(ids, statuses, strict=True)
        }

    def _outcome(
        self,
        job: NewJob,
        outcome: Submitted | RequestError,
        earlier: dict[str, Status | RequestError],
    ) -> tuple[str, Status] | RequestError:
        """The job that stands for a line, and its status."""
        services = self._services
        if isinstance(outcome, RequestError):
            return explained(outcome, job)
        if refusal := refusal_of(outcome, job, services.config.policy, services.reasons):
            return refusal
        status = earlier.get(outcome.job_id, "pending")
        return status if isinstance(status, RequestError) else (outcome.job_id, status)

    def _add(self, answers: Sequence[bytes | Due], queue: str) -> None:
        if self._wait_seconds is None:
            answers = [b"".join(one for one in answers if isinstance(one, bytes))]
        until = time.monotonic() + (self._wait_seconds or 0)
        self._owed.add(Block(answers, queue, until))


def _is_dup(outcome: Submitted) -> bool:
    return outcome.verdict == "dup"
