"""HTTP requests as handlers see them, and the replies and streams that handlers return."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar
from urllib.parse import parse_qsl

import anyio
import msgspec
from msgspec import Struct
from starlette.types import Receive, Scope, Send

from asyncinfer.api.admission import Admission, Reach
from asyncinfer.api.http.byte_budget import ByteBudget, Reservation
from asyncinfer.api.http.validation_errors import fault_of
from asyncinfer.errors import InvalidQuery, RequestError
from asyncinfer.jobs import TraceContext
from asyncinfer.schemas.requests import QUERY_OBJECTS

OWS: Final = " \t"
"""Optional white space in header fields (RFC 9110, 5.6.3). Python's `strip()` also removes other
characters, such as the byte 0xA0, which a proxy in front counts as part of a value."""

Query = TypeVar("Query", bound=Struct)
Header = tuple[bytes, bytes]

REQUEST_ID: Final = "asyncinfer.request_id"
"""Scope key: the id of the request, a string."""

_WAITS: Final = "asyncinfer.waits"
"""Scope key: there if the request asks to wait for a job."""

KEEP_BODY_OPEN: Final = "asyncinfer.keep_body_open"
"""Scope-state key: callable(scope) that lifts the deadline of the request's body."""

ABORT_CONNECTION: Final = "asyncinfer.abort_connection"
"""Scope-state key: callable() that aborts the connection of a client that reads no answer."""

_MAX_PARAMETERS: Final = 32
_NO_CONTENT: Final = 204

encode_json = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """The client closed the connection, so no answer is sent."""


class Request(Generic[Query]):
    """A request that passed the guard, with its caller and query. `tenant` is the caller's own,
    `reach` says whose jobs the request is about. Its body is read with `receive`, once; a large one
    has a reservation in `uploads`."""

    __slots__ = (
        "admission",
        "downloads",
        "headers",
        "query",
        "reach",
        "receive",
        "reservation",
        "scope",
        "tenant",
        "trace",
        "uploads",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        *,
        headers: Mapping[bytes, bytes],
        query: Query,
        admission: Admission,
        reach: Reach,
        uploads: ByteBudget,
        downloads: ByteBudget,
    ) -> None:
        self.scope = scope
        self.receive = receive
        self.headers = headers
        self.query = query
        self.admission = admission
        self.tenant = admission.tenant
        self.reach = reach
        self.uploads = uploads
        self.downloads = downloads
        self.reservation: Reservation | None = None
        """That of the whole body; None if it is small or not read."""
        self.trace: TraceContext | None = None
        """The context that the request's jobs get; None if their trace is not recorded."""

    def release_body(self) -> None:
        """Gives back what the body takes of the budget: call it once the body is in memory no more.
        Does nothing without a reservation, or the second time."""
        if self.reservation is not None:
            self.reservation.release()

    @property
    def request_id(self) -> str:
        """The client's X-Request-ID, or the one that was made for it."""
        text: str = self.scope.get(REQUEST_ID, "")
        return text

    def note_wait(self) -> None:
        """Notes, for who counts it, that the request asks to be answered when a job has ended."""
        self.scope[_WAITS] = True

    def path(self, name: str) -> str | None:
        """The path parameter `name`, decoded, or None if the route has none of that name."""
        part: str | None = self.scope["path_params"].get(name)
        return part

    def keep_body_open(self) -> None:
        """Lifts the deadline of this request's body; its handler must itself notice a client that
        sends nothing. The connection closes after the answer if the body has not ended."""
        if keep := self.scope.get("state", {}).get(KEEP_BODY_OPEN):
            keep(self.scope)

    def header(self, name: bytes) -> str | None:
        """The value of a header (name in lower case), None without it; several lines are joined
        with commas."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    def header_lines(self, name: bytes) -> list[str]:
        """The value of every line of a header that may be sent more than once (name in lower case);
        empty without it."""
        if name not in self.headers:
            return []
        return [value.decode("latin-1") for key, value in self.scope["headers"] if key == name]


def asked_to_wait(scope: Scope) -> bool:
    """Whether `Request.note_wait` was called for the request of this scope."""
    return _WAITS in scope


class Reply(Struct, frozen=True):
    """A complete answer; `headers` are those beside Content-Type, Content-Length and
    Cache-Control."""

    status: int
    body: bytes
    headers: tuple[Header, ...] = ()
    media_type: bytes = b"application/json"
    reservation: Reservation | None = None
    """The room for the body in the budget for answers, which is given back once it is sent."""


class Stream(Struct, frozen=True):
    """An answer of unknown length whose body is made while it is sent.

    `chunks` must end when the client disconnects, and watch for that itself, since only it knows
    whether the request's body is still being received.
    """

    chunks: AsyncGenerator[bytes, None]
    media_type: bytes
    status: int = 200
    headers: tuple[Header, ...] = ()
    reading: Callable[[], Awaitable[None]] | None = None
    """Reads the request while its answer is sent; returns when the client has disconnected."""
    revoked: Callable[[], Awaitable[RequestError]] | None = None
    """Returns once the caller's key is revoked, which ends the answer."""
    last_words: Callable[[RequestError], Awaitable[bytes]] | None = None
    """Makes the last chunk after the key was revoked, for clients that do not reconnect."""


class ClientTooSlow(Exception):
    """The client read nothing of its answer for too long."""


class StreamBroken(Exception):
    """An answer that had begun could not be finished; `__cause__` says why."""


def json_reply(status: int, body: Struct, *headers: Header) -> Reply:
    """A reply with the struct as JSON."""
    return Reply(status, encode_json(body), headers)


def header_block(reply: Reply) -> list[Header]:
    """All headers of a reply, names in lower case. No cache may keep a reply, since states
    change."""
    if reply.status == _NO_CONTENT:
        return [(b"cache-control", b"no-store"), *reply.headers]
    return [
        (b"content-type", reply.media_type),
        (b"content-length", str(len(reply.body)).encode()),
        (b"cache-control", b"no-store"),
        *reply.headers,
    ]


async def send_reply(reply: Reply, scope: Scope, send: Send, *, more: bool = False) -> None:
    """Sends the whole reply, without its body for HEAD. With `more` the answer stays open until
    `end_reply`."""
    await send(
        {"type": "http.response.start", "status": reply.status, "headers": header_block(reply)}
    )
    body = b"" if scope["method"] == "HEAD" else reply.body
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def send_large_reply(reply: Reply, scope: Scope, send: Send, max_seconds: float) -> None:
    """Sends the whole reply, and returns once the client has read nearly all of it. Raises
    ClientTooSlow if it has not within `max_seconds`."""
    await send_reply(reply, scope, send, more=True)
    try:
        with anyio.fail_after(max_seconds):
            await end_reply(send)
    except TimeoutError:
        raise ClientTooSlow(f"the client had not read its answer after {max_seconds:g} s") from None


async def send_stream(stream: Stream, scope: Scope, send: Send) -> None:
    """Sends chunks as they come. Raises StreamBroken if that fails, since no error reply can
    follow, or ClientTooSlow if that is the reason. Returns normally if the client disconnects, or
    once the caller's key is revoked."""
    try:
        if stream.reading is None:
            await _send_chunks(stream, scope, send)
            return
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_after, stream.reading, group.cancel_scope)
            await _send_chunks(stream, scope, send)
            group.cancel_scope.cancel()
    except ClientGone:
        return
    except Exception as error:
        if too_slow := _client_too_slow(error):
            raise too_slow from None
        raise StreamBroken from error


def _client_too_slow(error: Exception) -> ClientTooSlow | None:
    """The error itself or the first one inside a group, if that is a ClientTooSlow, else None: a
    task group wraps what a task raises."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, ClientTooSlow) else None


async def _cancel_after(reading: Callable[[], Awaitable[None]], scope: anyio.CancelScope) -> None:
    """Runs `reading`, and cancels the scope when it returns."""
    await reading()
    scope.cancel()


async def _send_chunks(stream: Stream, scope: Scope, send: Send) -> None:
    """Sends headers, chunks and the end; for HEAD no chunks. Closes the stream's generator."""
    headers = [
        (b"content-type", stream.media_type),
        (b"cache-control", b"no-store"),
        *stream.headers,
    ]
    async with contextlib.aclosing(stream.chunks) as chunks:
        await send({"type": "http.response.start", "status": stream.status, "headers": headers})
        if scope["method"] != "HEAD":
            last = await _send_until_revoked(stream, chunks, send)
            await send({"type": "http.response.body", "body": last, "more_body": True})
    await end_reply(send)


async def _send_until_revoked(
    stream: Stream, chunks: AsyncGenerator[bytes, None], send: Send
) -> bytes:
    """Sends chunks until they end or the key is revoked; returns the last chunk to send, empty
    unless the stream has `last_words` for a revoked key. Raises what the chunks raise."""
    if stream.revoked is None:
        await _send_all(chunks, send)
        return b""
    last, failure = b"", None

    async def end_when_revoked(revoked: Callable[[], Awaitable[RequestError]]) -> None:
        nonlocal last
        error = await revoked()
        group.cancel_scope.cancel()
        if stream.last_words:
            with anyio.CancelScope(shield=True):
                last = await stream.last_words(error)

    async with anyio.create_task_group() as group:
        group.start_soon(end_when_revoked, stream.revoked)
        try:
            await _send_all(chunks, send)
        except Exception as error:
            # The task group would wrap an error that is raised inside it.
            failure = error
        group.cancel_scope.cancel()
    if failure:
        raise failure
    return last


async def _send_all(chunks: AsyncGenerator[bytes, None], send: Send) -> None:
    async for chunk in chunks:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})


async def end_reply(send: Send) -> None:
    """Ends an answer that was left open."""
    await send({"type": "http.response.body", "body": b""})


def read_query(scope: Scope, struct: type[Query]) -> Query:
    """The query parameters as a struct, with its defaults for those not given; raises InvalidQuery,
    which names the invalid parameter."""
    text: bytes = scope["query_string"]
    if not text:
        return struct()
    parameters = {
        name: {QUERY_OBJECTS[name]: value} if name in QUERY_OBJECTS else value
        for name, value in _parameters(text)
    }
    try:
        return msgspec.convert(parameters, struct, strict=False)
    except msgspec.ValidationError as error:
        fault = fault_of(error, struct, is_text=True)
        name = fault.pointer.removeprefix("/").partition("/")[0]
        raise InvalidQuery(f"Query parameter `{name}`: {fault.detail}") from error


def _parameters(text: bytes) -> Sequence[tuple[str, Any]]:
    """The decoded names and values. Raises InvalidQuery for a query that cannot be decoded, is too
    long or repeats a name."""
    try:
        pairs = parse_qsl(
            text.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_PARAMETERS,
        )
    except ValueError as error:
        raise InvalidQuery(
            f"The query must be percent-encoded UTF-8 with at most {_MAX_PARAMETERS} parameters."
        ) from error
    names = [name for name, _ in pairs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InvalidQuery(f"Query parameter `{repeated[:64]}` is given more than once.")
    return pairs
