"""POST /predict with one request per line: reads and submits jobs while responses are sent."""

import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeVar

import anyio
import anyio.lowlevel
from starlette.types import Message

from asyncinfer.api.bulk.response_queue import Due, ResponseBlock, ResponseQueue
from asyncinfer.api.bulk.submitter import BatchSubmitter, NumberedJob
from asyncinfer.api.bulk.writer import ResponseWriter, problem_line
from asyncinfer.api.catalog import Served
from asyncinfer.api.group_closing import close_group, group_to_close
from asyncinfer.api.http.body import NDJSON, check_bulk_headers
from asyncinfer.api.http.byte_budget import SMALL_BODY_BYTES, Reservation
from asyncinfer.api.http.messages import ClientGone, ClientTooSlow, Request, Stream
from asyncinfer.api.http.ndjson import Line, LineSplitter
from asyncinfer.api.inputs.new_job import check_webhook, new_job
from asyncinfer.api.inputs.request_input import (
    check_query_options,
    is_slow_to_parse,
    options_of,
    read_line,
    read_long_line,
)
from asyncinfer.api.live.wait import preferred_wait, wait_for_disconnect
from asyncinfer.api.services import Services
from asyncinfer.errors import (
    BodyTooLarge,
    GroupClosed,
    GroupNotClosed,
    InvalidHeader,
    RequestError,
    RequestTimeout,
    ServerStopping,
    TooManyRefusedLines,
)
from asyncinfer.repository.submissions import MAX_BYTES_PER_CALL, MAX_JOBS_PER_CALL, NewJob
from asyncinfer.schemas.requests import SubmitQuery

T = TypeVar("T")

_AT_A_STRETCH_SECONDS: Final = 0.01
"""How long lines are checked before the event loop serves other clients."""

_MAX_REFUSED: Final = 1000
_MAX_REFUSED_PER_ACCEPTED: Final = 10
"""A refused line may be two bytes long, and costs as much as an accepted one: half a million of
them kept a server busy for 15 s, with 116 MB of answers. So a request ends once more than
`_MAX_REFUSED` lines were refused, and more than ten for each accepted line."""


class _KeyRevoked(Exception):
    """The client's key was revoked, so no more lines are read."""


async def predict_lines(services: Services, request: Request[SubmitQuery]) -> Stream:
    """Returns the stream of response lines, which reads the request while it is sent. Raises errors
    that concern the whole request; an error in a line becomes that line's response."""
    check_bulk_headers(request)
    if request.header(b"idempotency-key") is not None:
        raise InvalidHeader(
            "Idempotency-Key does not go with one request a line: give each line a member "
            "`idempotency_key` of its own."
        )
    options = options_of(request.query)
    check_query_options(options, services.config.max_ttl_seconds)
    if request.query.close:
        group_to_close(options)
    wait_seconds = preferred_wait(request)
    await services.catalog.find(request.path("model"))
    request.keep_body_open()
    responses = ResponseQueue()
    reader = BulkReader(services, request, responses, wait_seconds)
    await reader.begin()
    applied = () if wait_seconds is None else ((b"preference-applied", b"wait=%d" % wait_seconds),)
    return Stream(
        ResponseWriter(services, responses).chunks(),
        NDJSON.encode(),
        headers=applied,
        reading=reader.run,
        last_words=reader.end_after_revocation,
    )


class BulkReader:
    """Reads lines, submits them as they come, and adds a response for each to `responses`. One
    object for each request."""

    def __init__(
        self,
        services: Services,
        request: Request[SubmitQuery],
        responses: ResponseQueue,
        wait_seconds: int | None,
    ) -> None:
        """`wait_seconds` is how long each response may wait for its job's end; None answers every
        job with its 202."""
        self._services = services
        self._request = request
        self._options = options_of(request.query)
        """Of lines without their own."""
        self._responses = responses
        self._wait_seconds = wait_seconds
        self._silence_seconds = services.config.body_timeout_seconds
        self._first: Message | None = None
        self._received_at = time.monotonic()
        self._last_line = 0
        self._accepted_lines = self._refused_lines = 0
        self._submitter = BatchSubmitter(services, wait_seconds)
        self._interruptible = anyio.CancelScope()
        """The cancel scope of waits that end when the API stops; never around a submit."""
        self._key_is_revoked = False
        self._reservation: Reservation | None = None
        """That of the line that has not ended, if it is long."""
        self._reading_ended = anyio.Event()
        """Set once no more lines are read."""

    async def begin(self) -> None:
        """Call before the answer begins. Reads once from a client that waits for `100 Continue`,
        which makes the server send it; does nothing for others."""
        if b"expect" in self._request.headers:
            self._first = await self._request.receive()

    async def run(self) -> None:
        """Reads and submits all lines, then returns when the client has disconnected, or at once if
        it did before. An error that ends the reading becomes the last response line; only
        ClientTooSlow is raised."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._stop_with_the_api)
            try:
                await self._read()
                await self._close_group()
            except ClientGone:
                return
            except _KeyRevoked:
                pass
            except RequestError as error:
                self._services.request_figures.refused(error.code)
                self._add([problem_line(error, self._last_line + 1)], "")
            finally:
                self._release_line()
                self._reading_ended.set()
                group.cancel_scope.cancel()
        self._responses.end()
        await wait_for_disconnect(self._request)

    async def end_after_revocation(self, error: RequestError) -> bytes:
        """Stops reading because the client's key was revoked, and returns the answer's last line,
        made from `error`. A submit in progress is completed first."""
        self._key_is_revoked = True
        self._interruptible.cancel()
        await self._reading_ended.wait()
        explained_error = type(error)(
            f"{error.detail} Lines before this one were accepted unless they are faulty; for those "
            "without an answer see `GET /jobs` with another key."
        )
        return problem_line(explained_error, self._last_line + 1)

    async def _stop_with_the_api(self) -> None:
        """Waits until the API stops, then ends the wait in progress, so that the reader finds it
        out."""
        await self._services.inbox.closing.wait()
        self._interruptible.cancel()

    async def _read(self) -> None:
        """Processes all lines of the body. Raises ClientGone, ClientTooSlow, _KeyRevoked, or the
        RequestError that ends the reading."""
        lines = LineSplitter(self._services.config.max_json_bytes)
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            more = message.get("more_body", False)
            await self._process(lines.cut(message.get("body", b"")))
            await self._reserve_line(lines.partial_bytes)
        await self._process(lines.rest())

    async def _close_group(self) -> None:
        """Closes the group of the query if that asks for it. Unless all lines were accepted, raises
        GroupNotClosed, since those that are sent again would be refused, or GroupClosed if the
        group was closed before. Raises as `close_group` does."""
        if not self._request.query.close:
            return
        group, tenant = group_to_close(self._options), self._request.tenant
        if refused := self._refused_lines + self._submitter.refused_jobs:
            lines = "1 line was" if refused == 1 else f"{refused} lines were"
            if await self._services.closed_groups.is_closed(tenant, group):
                raise GroupClosed(
                    f"{lines} refused, and the group {group} was closed before. Send what can be "
                    "accepted to another group."
                )
            raise GroupNotClosed(
                f"{lines} refused, so the group was not closed. Send again what can be accepted, "
                "then close the group with POST /group/{group}/close."
            )
        await close_group(self._services, tenant, group)

    # --- room for long lines ---------------------------------------------------------------

    async def _reserve_line(self, partial_bytes: int) -> None:
        """Makes sure that the part of a line that was received has room in the budget of uploads if
        it is long. Waits for the room; raises TooManyUploads, and as `_unless_stopped` does."""
        if partial_bytes <= SMALL_BODY_BYTES:
            self._release_line()
            return
        if self._reservation is None:
            self._reservation = await self._unless_stopped(self._long_line, math.inf)
        assert self._reservation is not None, "there is no limit of time"
        self._reservation.received(partial_bytes)

    async def _long_line(self) -> Reservation:
        """Reserves room for a line of any allowed length. If it comes too slowly while others wait,
        what this object waits for is ended."""
        max_bytes = self._services.config.max_json_bytes
        return await self._request.uploads.reserve(max_bytes, lambda: self._interruptible.cancel())

    def _release_line(self) -> None:
        """Gives back the room of the line that has ended, if it had any."""
        if self._reservation is not None:
            self._reservation.release()
            self._reservation = None

    # --- waiting for the client ------------------------------------------------------------

    async def _receive(self) -> Message:
        """Returns the client's next message. A client may be silent while it waits for responses;
        else raises RequestTimeout when it is silent for too long. Raises as `_unless_stopped`
        does."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            silent_since = max(self._received_at, self._responses.popped_at)
            seconds_left = silent_since + self._silence_seconds - time.monotonic()
            if self._responses:
                seconds_left = self._silence_seconds
            elif seconds_left <= 0:
                raise RequestTimeout(
                    f"Nothing came for {self._silence_seconds:g} s, and the body had not ended. "
                    "Send this line and those after it again."
                )
            if message := await self._unless_stopped(self._request.receive, seconds_left):
                self._received_at = time.monotonic()
                return message

    async def _wait_for_room(self) -> None:
        """Returns once another response fits into the queue; raises ClientTooSlow if the client
        reads none of its responses for too long. Raises as `_unless_stopped` does."""
        max_seconds = self._silence_seconds + (self._wait_seconds or 0)
        if await self._unless_stopped(self._has_room, max_seconds) is None:
            raise ClientTooSlow(f"the client read nothing of its answer for {max_seconds:g} s")

    async def _has_room(self) -> bool:
        """Waits for room and returns True, which for `_unless_stopped` means that its time was not
        up."""
        await self._responses.wait_for_room()
        return True

    async def _unless_stopped(self, call: Callable[[], Awaitable[T]], seconds: float) -> T | None:
        """The result of `call`, or None if it takes longer than `seconds` and is cancelled. Raises
        ServerStopping if the API stops, _KeyRevoked if the key is revoked, and TooManyUploads if a
        long line came too slowly, before or during the call."""
        if not (
            self._key_is_revoked or self._is_too_slow() or self._services.inbox.closing.is_set()
        ):
            with anyio.move_on_after(seconds) as self._interruptible:
                return await call()
        if self._key_is_revoked:
            raise _KeyRevoked
        if self._is_too_slow():
            raise self._request.uploads.too_slow_error()
        if self._services.inbox.closing.is_set():
            raise ServerStopping(
                "The server is stopping, and did not read this line or those after it. Send them "
                "again.",
                retry_after_seconds=1,
            )
        return None

    def _is_too_slow(self) -> bool:
        """Whether the long line that is being received was ended for other requests."""
        return self._reservation is not None and self._reservation.is_ended

    # --- from lines to answers -------------------------------------------------------------

    async def _process(self, lines: Iterator[Line]) -> None:
        """Submits the jobs of these lines in batches, and adds their responses; returns when there
        are no more lines. Raises TooManyRefusedLines, and as `_wait_for_room` does."""
        while True:
            await self._wait_for_room()
            served = await self._find_model()
            if not (batch := await self._read_batch(lines, served)):
                return
            queue = served.queue if isinstance(served, Served) else ""
            self._add(await self._submitter.submit(batch), queue)
            self._check_refused()
            await anyio.lowlevel.checkpoint()

    def _check_refused(self) -> None:
        """Raises TooManyRefusedLines once more than 1,000 lines were refused, and more than ten for
        each accepted one."""
        refused, accepted = self._refused_lines, self._accepted_lines
        if refused > max(_MAX_REFUSED, _MAX_REFUSED_PER_ACCEPTED * accepted):
            raise TooManyRefusedLines(
                f"{refused} lines were refused and {accepted} accepted, so this line and those "
                "after it were not read. Fix what the answers name, and send the rest again."
            )

    async def _find_model(self) -> Served | RequestError:
        """Returns the model as it is served now, or the error that says why it is not: a request
        may last longer than a version is served."""
        try:
            return await self._services.catalog.find(self._request.path("model"))
        except RequestError as error:
            return error

    async def _read_batch(
        self, lines: Iterator[Line], served: Served | RequestError
    ) -> list[NumberedJob]:
        """Reads and checks as many lines as one script call takes, for at most 10 ms and one line
        more. Returns each line's number with its job or error, in order; empty if no lines are
        left."""
        batch: list[NumberedJob] = []
        size = 0
        until = time.perf_counter() + _AT_A_STRETCH_SECONDS
        for line in lines:
            self._last_line = line.number
            try:
                batch.append((line.number, await self._job_of(line, served)))
                self._accepted_lines += 1
            except RequestError as error:
                batch.append((line.number, error))
                self._refused_lines += 1
            size += len(line.text or b"")
            if (
                len(batch) == MAX_JOBS_PER_CALL
                or size > MAX_BYTES_PER_CALL
                or time.perf_counter() > until
            ):
                break
        return batch

    async def _job_of(self, line: Line, served: Served | RequestError) -> NewJob:
        """The job of a line. Raises the line's error: it is too long, does not fit the model, or
        the model is not served."""
        if line.text is None:
            raise BodyTooLarge(
                f"A line may have {self._services.config.max_json_bytes} bytes. Send fewer rows "
                "per line, or raise MAX_JSON."
            )
        if isinstance(served, RequestError):
            raise served
        options, max_ttl_seconds = self._options, self._services.config.max_ttl_seconds
        if is_slow_to_parse(line.text):
            limiter = self._services.long_reads
            parsed, key = await read_long_line(line.text, options, served, max_ttl_seconds, limiter)
        else:
            parsed, key = read_line(line.text, options, served, max_ttl_seconds)
        request = self._request
        check_webhook(self._services.webhook_checks, request.tenant, parsed.options)
        return new_job(
            request.tenant,
            served.queue,
            parsed,
            key,
            request_id=request.request_id,
            trace=request.trace,
        )

    def _add(self, answers: Sequence[bytes | Due], queue: str) -> None:
        """Adds the responses of a batch as one block. `queue` is that of its jobs, empty if the
        model is not served."""
        if self._wait_seconds is None:
            answers = [b"".join(answer for answer in answers if isinstance(answer, bytes))]
        until = time.monotonic() + (self._wait_seconds or 0)
        self._responses.add(ResponseBlock(answers, queue, until))
